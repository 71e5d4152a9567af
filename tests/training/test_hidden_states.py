"""Runs on kept hidden states: the losses of computed ones, and what the files are checked for."""

import os
import re
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.head_files import heads_file, random_heads
from helpers.runs import lines, train
from safetensors.numpy import load_file

from medusa_jax.checkpoints.load import load_model
from medusa_jax.errors import InputError
from medusa_jax.files import OutputError, locked
from medusa_jax.training import hidden_states, settings
from medusa_jax.training.dataset import read_rows
from medusa_jax.training.hidden_states import Files, with_hidden_states
from medusa_jax.training.mesh import make_mesh
from medusa_jax.training.weights import heads_shape, load, model_shape, plan
from medusa_jax.training.workdir import claimed

STEPS = 8


@pytest.fixture(scope="module")
def kept(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that has computed the hidden states of all its rows, and their directory."""
    directory = tmp_path_factory.mktemp("kept")
    states = directory / "states"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hidden_states, "FILE_BYTES", 8 * 16 * 16 * 2)  # 8 rows: several files
        code, err = train(place, directory / "run", *flags(states))
    assert code == 0, err
    assert "hidden states of" in err
    assert re.search(r"accepted length of the chain 1\.\d+, in the selector's order 1\.\d+", err)
    return directory / "run", states


def flags(states: Path | str, *more: str) -> list[str]:
    heads = {"shared": True, "truncated": 20, "selector": 4}
    shape = [f"--config.heads.{name}={value}" for name, value in heads.items()]
    return [f"--config.data.hidden_states={states}", f"--config.optim.steps={STEPS}", *shape, *more]


@pytest.mark.e2e
@pytest.mark.slow
def test_losses_are_those_of_computed_states_up_to_the_rounding(
    place: Path, kept: tuple[Path, Path], tmp_path: Path
):
    code, err = train(place, tmp_path / "run", *flags(""))
    assert code == 0, err
    for ours, theirs in zip(lines(kept[0]), lines(tmp_path / "run"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in (name for name in ours if "loss" in name):
            assert ours[name] == pytest.approx(theirs[name], rel=0.005), name
    assert lines(kept[0]) != lines(tmp_path / "run")
    held_out = [line for line in lines(kept[0]) if "eval_selector_loss" in line]
    assert held_out[-1]["eval_selector_loss"] < held_out[0]["eval_selector_loss"]
    heads = load_model(place / "model", kept[0] / "heads").heads
    assert (heads.truncated, heads.selector) == (20, 4)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_killed_run_computes_what_is_missing_and_resumes_exactly(
    place: Path, kept: tuple[Path, Path], tmp_path: Path
):
    states = tmp_path / "states"
    shutil.copytree(kept[1], states)
    files = sorted(states.glob("*/*.npy"))
    assert len(files) > 3
    before = {file: file.read_bytes() for file in files}
    times = {file: file.stat().st_mtime_ns for file in files[:1]}
    for file in files[1:]:
        file.unlink()
    (states / "train/00001.tmp").write_bytes(b"half of a file")
    code, err = train(place, tmp_path / "run", *flags(states, "--config.run.save_every=3"))
    assert code == 0, err
    assert {file: file.read_bytes() for file in files} == before
    assert {file: file.stat().st_mtime_ns for file in files[:1]} == times
    assert lines(tmp_path / "run") == lines(kept[0])
    shutil.rmtree(tmp_path / "run/checkpoints/8")  # as if killed after step 6
    shutil.rmtree(tmp_path / "run/heads")
    code, err = train(place, tmp_path / "run", *flags(states, "--config.run.save_every=3"))
    assert code == 0, err
    assert "hidden states of" not in err  # all are there
    assert lines(tmp_path / "run") == lines(kept[0])
    name = "heads/medusa_lm_head.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (kept[0] / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.data.sequence_length=24", "other training data"),
        ("--config.data.max_documents=90", "other training data"),
        ("--config.model.dtype=bfloat16", "another backbone"),
        ("--config.mode=medusa2", "a backbone that does not learn"),
    ],
)
def test_states_of_something_else_are_refused(
    place: Path, kept: tuple[Path, Path], tmp_path: Path, change: str, message: str
):
    code, err = train(place, tmp_path / "run", *flags(kept[1], change))
    assert (code, message in err) == (2, True), err


def test_rows_are_read_from_their_files(tmp_path: Path):
    files = Files(tmp_path, 2, (3, 2))
    states = np.arange(18, dtype=np.float32).reshape(3, 3, 2)
    bits = states.astype(files.read([]).dtype).view(np.uint16)
    files.write(0, bits[:2])
    files.write(1, bits[2:])
    np.save(tmp_path / "saved.npy", bits[:2])
    assert files.path(0).read_bytes() == (tmp_path / "saved.npy").read_bytes()
    np.testing.assert_array_equal(
        files.read([2, -1, 0]).astype(np.float32), [states[2], 0 * states[2], states[0]]
    )


def test_a_full_disk_leaves_no_file_and_says_so(tmp_path: Path):
    """A limit on the size of files, 2 bytes too small, stands for the disk."""
    files, before = Files(tmp_path, 2, (3, 2)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 2 * 2 * 3 * 2 - 2, before[1]))
    try:
        with pytest.raises(OutputError, match=r"00000.npy could not be written: file too large"):
            files.write(0, np.zeros((2, 3, 2), np.uint16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.heads.truncated=42", "expected fewer than the model's 42 tokens"),
        ("--config.heads.path=nowhere", "nowhere does not exist"),
        ("--config.heads.path={heads}", "num_heads=3"),
    ],
)
def test_no_states_are_computed_for_heads_that_cannot_be(
    place: Path, tmp_path: Path, change: str, message: str
):
    start = heads_file(tmp_path, random_heads(3, vocab=None))
    states = tmp_path / "states"
    given = [*flags(states, "--config.heads.truncated=0"), change.format(heads=start)]
    code, err = train(place, tmp_path / "run", *given)
    assert (code, message in err, states.exists()) == (2, True, False), err


def test_states_are_shared_whole_and_written_by_one_process(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hidden_states, "FILE_BYTES", 8 * 16 * 16 * 2)
    config = settings.Config(
        model=settings.Backbone(path=str(place / "model"), dtype="float32"),
        data=settings.Data(
            train=(str(place / "stories.txt"),),
            hidden_states=str(tmp_path),
            sequence_length=16,
            max_documents=20,
            eval_rows=8,
        ),
        optim=settings.Optim(batch_size=4),
    )
    mesh, rows = make_mesh(settings.Mesh(), jax.devices()[:1]), read_rows(config, True)
    with claimed(tmp_path):  # a run may keep its states in its own directory
        with_hidden_states(config, mesh, *rows)
    before = {file: file.read_bytes() for file in tmp_path.glob("*/*.npy")}
    assert {file.parent.name for file in before} == {"train", "eval"}
    with locked(tmp_path / hidden_states.LOCK, "what is complete is only read"):
        with_hidden_states(config, mesh, *rows)
    os.truncate(tmp_path / "train/00001.npy", 1000)
    with (
        locked(tmp_path / hidden_states.LOCK, "another process writes"),
        pytest.raises(InputError, match="is written by process"),
    ):
        with_hidden_states(config, mesh, *rows)
    (tmp_path / "eval/index.json").unlink()  # now these states could be of anything
    stale = tmp_path / "eval/00000.npy"
    stale.write_bytes(bytes(stale.stat().st_size))
    with_hidden_states(config, mesh, *rows)
    assert {file: file.read_bytes() for file in before} == before


def test_nothing_of_the_backbone_but_its_projection_is_in_the_step(place: Path):
    config = settings.Config(
        model=settings.Backbone(path=str(place / "model")),
        heads=settings.Heads(number=2),
        data=settings.Data(hidden_states="states"),
    )
    model = model_shape(config)
    table = plan(config, model, heads_shape(config, model))
    assert {path for path in table if path.startswith("backbone/")} == {"backbone/embed/embedding"}


def test_heads_to_start_from_get_a_selector_where_they_have_none(place: Path, tmp_path: Path):
    start = heads_file(tmp_path, random_heads(2, vocab=None))
    config = settings.Config(
        model=settings.Backbone(path=str(place / "model"), dtype="float32"),
        heads=settings.Heads(number=2, shared=True, selector=4, path=str(start)),
    )
    weights = load(config, make_mesh(settings.Mesh(), jax.devices()[:1]), with_frozen=False)
    heads = weights.trainable["heads"]
    np.testing.assert_array_equal(
        heads["head_1"]["block_0"]["weight"], load_file(start)["1.0.linear.weight"]
    )
    assert heads["selector"]["before"]["weight"].shape == (4, 16)
    assert np.std(heads["selector"]["after"]["weight"]) == pytest.approx(0.25, rel=0.3)
    assert not heads["selector"]["context"]["weight"].any()
