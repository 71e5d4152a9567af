"""Whole runs: what they leave behind, how they stop, and that a resumed one is the same one."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import fsspec
import jax
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from helpers.head_files import stored
from helpers.paths import ROOT
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_jax import Decoder, Greedy, Tree, export, load_model, outputs
from medusa_jax.checkpoints.names import backbone_places
from medusa_jax.convert import convert
from medusa_jax.drafting.medusa_drafter import medusa_drafter
from medusa_jax.errors import InputError
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.model.config import from_hf
from medusa_jax.param_paths import joined
from medusa_jax.training import checkpoints, lora, scanned_backbone, settings, workdir
from medusa_jax.training.checkpoints import Checkpoints
from medusa_jax.training.config_file import read_config
from medusa_jax.training.mesh import make_mesh
from medusa_jax.training.weights import heads_shape, load, model_shape, plan

WORDS = ["<s>", "</s>", *(f"w{i}" for i in range(40))]
CONFIG = """
from medusa_jax.training.settings import *

def get_config():
    return Config(
        mode="medusa1",
        model=Backbone(path={model!r}, dtype="float32"),
        heads=Heads(number=2),
        lora=Lora(rank=2, dropout=0.1),
        data=Data(train=({data!r},), end="</s>", sequence_length=16, eval_fraction=0.1,
                  eval_rows=8),
        loss=Loss(chunk=8),
        optim=Optim(batch_size=4, steps=24, warmup_steps=2, learning_rate=3e-3),
        mesh=Mesh(fsdp=1),
        run=Run(log_every=1, eval_every=8, save_every=4, tensorboard=False),
    )
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of words, some text to learn, and a config file."""
    directory = tmp_path_factory.mktemp("trainer")
    model = directory / "model"
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(model)
    config = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "head_dim": 4,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": len(WORDS), "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "eos_token_id": 1, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    places = backbone_places(from_hf(config)).items()
    tensors = {name: rng.normal(0, 0.2, one.shape).astype(np.float32) for name, one in places}
    tensors |= {name: 1 + 0 * t for name, t in tensors.items() if t.ndim == 1}
    save_file(tensors, model / "model.safetensors")
    # Text with a pattern, so that there is something to learn: every word is followed by the next.
    starts = rng.integers(0, 40, 200)
    stories = [" ".join(f"w{(s + i) % 40}" for i in range(rng.integers(8, 40))) for s in starts]
    (directory / "stories.txt").write_text("<|endoftext|>".join(stories))
    text = CONFIG.format(model=str(model), data=str(directory / "stories.txt"))
    (directory / "config.py").write_text(text)
    return directory


def train(place: Path, workdir: Path | str, *flags: str) -> tuple[int, str]:
    """Runs train.py in this process: (exit code, stderr)."""
    old, err = sys.argv, io.StringIO()
    sys.argv = ["train.py", "--config", str(place / "config.py"), "--workdir", str(workdir), *flags]
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        sys.argv = old
        signal.signal(signal.SIGTERM, before)
    assert "Traceback" not in err.getvalue()
    return int(done.value.code or 0), err.getvalue()


def lines(workdir: Path) -> list[dict[str, Any]]:
    """Logged metrics, but for the speed, which no two runs share."""
    every = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in every]


@pytest.fixture(scope="session")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run that was never stopped."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    code, err = train(place, workdir)
    assert code == 0, err
    return workdir


@pytest.mark.e2e
@pytest.mark.slow
def test_a_run_leaves_config_metrics_checkpoints_and_heads(place: Path, finished: Path):
    config = settings.from_dict(json.loads((finished / "config.json").read_text()))
    assert (config.optim.steps, config.model.path) == (24, str(place / "model"))
    logged = [line for line in lines(finished) if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 25))
    contract = {"loss", "lm_loss", "head_loss", "head_top1", "learning_rate"}
    assert all(contract <= line.keys() and len(line["head_top1"]) == 2 for line in logged)
    assert logged[-1]["head_loss"] < logged[0]["head_loss"]
    held_out = [line["step"] for line in lines(finished) if "eval_perplexity" in line]
    assert held_out == [0, 8, 16, 24]
    assert Checkpoints(finished).steps == [16, 20, 24]  # the newest three
    assert json.loads((finished / "heads/config.json").read_text()) == {
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "base_model_name_or_path": str(place / "model"),
    }


@pytest.mark.e2e
@pytest.mark.slow
def test_heads_are_exported_in_the_originals_layout_and_read_back(place: Path, finished: Path):
    tensors = load_file(finished / "heads/medusa_lm_head.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes == {
        f"{i}.{name}": shape
        for i in range(2)
        for name, shape in (
            ("0.linear.weight", (16, 16)),
            ("0.linear.bias", (16,)),
            ("1.weight", (42, 16)),
        )
    }
    pickled = torch.load(finished / "heads/medusa_lm_head.pt", weights_only=True)
    assert {name: tensor.numpy().tobytes() for name, tensor in pickled.items()} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }
    model = load_model(place / "model", finished / "heads")
    state = Checkpoints(finished)._manager.restore(24)
    trained = state["trainable"]["heads"]
    heads = stored(model.params["heads"])
    for head in ("head_0", "head_1"):
        np.testing.assert_array_equal(heads[head]["vocab"], trained[head]["vocab"])
        block = heads[head]["block_0"]
        np.testing.assert_array_equal(block["weight"], trained[head]["block_0"]["weight"])
        assert np.abs(trained[head]["block_0"]["bias"]).max() > 0  # biases learn too


def wait_for_checkpoint(workdir: Path, step: int, process: subprocess.Popen) -> None:
    """Returns once a checkpoint of that step or a later one is complete."""
    deadline = time.monotonic() + 200
    while not any(int(d.name) >= step for d in workdir.glob("checkpoints/*") if d.name.isdigit()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.002)


def launch(
    place: Path, workdir: Path, *flags: str, before: Sequence[str] = (), **env: str
) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--config", place / "config.py", "--workdir", workdir]
    return subprocess.Popen(
        [*before, *command, *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
    )


@pytest.mark.e2e
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(place: Path, finished: Path, tmp_path: Path):
    """SIGKILL in the middle, a half-written line of metrics, then on to the end."""
    workdir = tmp_path / "run"
    process = launch(place, workdir)
    wait_for_checkpoint(workdir, 8, process)
    process.kill()
    process.communicate()
    reached = Checkpoints(workdir).latest or 0
    assert 0 < reached < 24
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    code, err = train(place, workdir)
    assert code == 0, err
    assert f"resuming at step {reached} of 24" in err
    assert lines(workdir) == lines(finished)
    name = "heads/medusa_lm_head.safetensors"
    assert (workdir / name).read_bytes() == (finished / name).read_bytes()


JOINT = ["--config.mode=medusa2", "--config.optim.accumulation=2", "--config.lora.dropout=0.2"]


@pytest.mark.e2e
@pytest.mark.slow
def test_sigterm_saves_and_a_restart_goes_on_to_the_same_bits(place: Path, tmp_path: Path):
    """Medusa-2 with dropout and accumulation: all that random numbers and order decide."""
    code, err = train(place, tmp_path / "whole", *JOINT)
    assert code == 0, err
    workdir = tmp_path / "run"
    process = launch(place, workdir, *JOINT)
    wait_for_checkpoint(workdir, 4, process)
    process.terminate()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1, err
    assert "is saved and can be resumed" in err
    code, err = train(place, workdir, *JOINT)
    assert code == 0, err
    assert "resuming at step" in err
    assert lines(workdir) == lines(tmp_path / "whole")
    name = "model/model.safetensors"
    assert (workdir / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.e2e
@pytest.mark.slow
def test_changed_data_is_noticed_before_a_run_goes_on(place: Path, finished: Path, tmp_path: Path):
    data = place / "stories.txt"
    before = data.read_text()
    data.write_text(before + "<|endoftext|>w1 w2 w3")
    try:
        code, err = train(place, finished)
    finally:
        data.write_text(before)
    assert code == 2
    assert "the training data has changed since this run began" in err


@pytest.mark.e2e
@pytest.mark.slow
def test_checkpoints_of_nobody_knows_which_run_are_refused(
    place: Path, finished: Path, tmp_path: Path
):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/config.json").unlink()
    code, err = train(place, tmp_path / "run")
    assert code == 2
    assert "holds checkpoints, but no config.json" in err


def pair(place: Path, *workdirs: Path, flags: Sequence[str] = ()) -> list[subprocess.Popen]:
    """One run split over two processes, with one working directory or, wrongly, two."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        launch(place, workdir, "--config.mesh.fsdp=2", *flags, JAX_PROCESS_ID=str(i), **names)
        for i, workdir in enumerate((*workdirs, *workdirs)[:2])
    ]


def ended(processes: list[subprocess.Popen], code: int) -> list[str]:
    """What both said on stderr, once both have ended with that exit code."""
    errors = [process.communicate(timeout=250)[1] for process in processes]
    assert [process.returncode for process in processes] == [code, code], errors
    return errors


@pytest.mark.e2e
@pytest.mark.slow
def test_two_processes_train_as_one(place: Path, finished: Path, tmp_path: Path):
    """A run split over two processes, stopped by a SIGTERM to one of them, and resumed.

    Both stop after the same step, nothing is lost, and the whole is what one process gives.
    """
    stopped = tmp_path / "stopped"
    processes = pair(place, stopped, flags=["--config.run.save_every=0"])  # only a signal saves
    deadline = time.monotonic() + 200
    while not (stopped / "config.json").is_file():  # then the step is compiled
        assert processes[0].poll() is None, processes[0].communicate()[1]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.002)
    processes[1].terminate()
    found = [re.search(r"step (\d+) is saved and can be", e) for e in ended(processes, code=1)]
    (step,) = {int(match[1]) if match else None for match in found}
    assert step and Checkpoints(stopped).steps == [step]
    assert lines(stopped)[-1]["step"] == step < 24  # reported up to the checkpoint
    assert f"resuming at step {step} of 24" in ended(pair(place, stopped), code=0)[0]
    for ours, theirs in zip(lines(stopped), lines(finished), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-3, err_msg=name)
    name = "heads/medusa_lm_head.safetensors"
    ours, theirs = load_file(stopped / name), load_file(finished / name)
    for key in theirs:
        np.testing.assert_allclose(ours[key], theirs[key], atol=1e-3)


@pytest.mark.e2e
@pytest.mark.slow
def test_processes_that_do_not_share_their_directory(place: Path, tmp_path: Path):
    for said in ended(pair(place, tmp_path / "a", tmp_path / "b"), code=2):
        assert "processes [1] of 2 do not see what process 0 writes there" in said
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and not list((tmp_path / "a").iterdir())


class Bucket(MemoryFileSystem):
    """An object store in memory, in place of Google's."""

    protocol, store, pseudo_dirs = ("gcs", "gs"), {}, [""]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """gs://bucket/run, but for its checkpoints, which tensorstore would send to Google."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(checkpoints, "open_workdir", lambda _: tmp_path)
    return workdir.open_workdir("gs://bucket/run")


@pytest.mark.slow
def test_a_run_in_a_bucket(place: Path, finished: Path, bucket: Path):
    flags = ["--config.run.tensorboard=true"]
    code, err = train(place, bucket, *flags)
    assert code == 0, err
    assert "wrote gs://bucket/run/heads" in err
    assert "no TensorBoard events: they need google.cloud.storage" in err
    assert lines(bucket) == lines(finished)
    names = ["heads/medusa_lm_head.safetensors", "heads/medusa_lm_head.pt", "data.json"]
    for name in names:
        assert (bucket / name).read_bytes() == (finished / name).read_bytes()
    code, err = train(place, bucket, *flags)
    assert code == 0, err
    assert "resuming at step 24 of 24" in err
    assert lines(bucket) == lines(finished)
    code, err = train(place, bucket, "--config.seed=3")
    assert code == 2
    assert "seed: 0 -> 3" in err


@pytest.mark.parametrize(
    ("name", "message"),
    [("az://bucket/run", "cannot be reached: "), ("ftp://host/run", "expected a directory, or gs")],
)
def test_addresses_that_cannot_be_reached(place: Path, name: str, message: str):
    code, err = train(place, name)
    assert code == 2
    assert f"--workdir {name}" in err and message in err


@pytest.mark.e2e
@pytest.mark.slow
def test_another_config_in_the_same_directory_is_refused(place: Path, finished: Path):
    code, err = train(place, finished, "--config.optim.learning_rate=0.5", "--config.seed=3")
    assert code == 2
    assert "optim.learning_rate: 0.003 -> 0.5" in err
    assert "seed: 0 -> 3" in err
    before = lines(finished)
    code, err = train(place, finished, "--config.run.log_every=3")  # how, not what
    assert code == 0, err
    assert lines(finished) == before


@pytest.mark.e2e
@pytest.mark.slow
def test_nan_stops_the_run_and_names_the_last_good_checkpoint(place: Path, tmp_path: Path):
    code, err = train(
        place, tmp_path / "run", "--config.optim.learning_rate=1e30", "--config.optim.clip=0"
    )
    assert code == 1
    message = err.strip().splitlines()[-1]
    assert "Diverged: step " in message
    assert "gradient norm" in message
    saved = Checkpoints(tmp_path / "run").latest
    assert (f"checkpoints/{saved}" if saved else "there is none yet") in message


@pytest.mark.e2e
@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(place: Path, tmp_path: Path):
    """Files may grow to 12 KB only, which fails writes as a full disk does."""
    workdir, flags = tmp_path / "run", ["--config.heads.number=6", "--config.run.log_every=8"]
    code, err = train(place, workdir, *flags)
    assert code == 0, err
    whole = lines(workdir)
    for step in (20, 24):
        shutil.rmtree(workdir / f"checkpoints/{step}")
    limit = ["bash", "-c", 'ulimit -f 12; trap "" XFSZ; "$@"', "-"]
    process = launch(place, workdir, *flags, before=limit)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    assert "error: CheckpointError: a checkpoint could not be written" in err
    assert f"the last good one: {workdir / 'checkpoints/16'}" in err
    code, err = train(place, workdir, *flags)  # with room again, it goes on from there
    assert code == 0, err
    assert "resuming at step 16 of 24" in err
    assert lines(workdir) == whole


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_medusa2_is_exported_as_one_model_that_decodes_as_before(
    place: Path, finished: Path, tmp_path: Path, rank: int
):
    """Full, and LoRA with KL from a tied model, from the heads of the first stage."""
    flags = ["--config.mode=medusa2", f"--config.heads.path={finished}"]
    flags += [f"--config.lora.rank={rank}", f"--config.loss.distill={bool(rank)}"]
    flags += ["--config.optim.learning_rate=0.05"]
    code, err = train(place, tmp_path / "run", *flags)
    assert code == 0, err
    merged = load_model(tmp_path / "run/model")
    assert merged.heads.num_heads == 2
    assert merged.config.tied == (rank == 0)
    settings_file = json.loads((tmp_path / "run/model/config.json").read_text())
    assert (settings_file["medusa_num_heads"], settings_file["medusa_num_layers"]) == (2, 1)
    assert (tmp_path / "run/model/tokenizer.json").is_file()
    start = load_model(place / "model").params["backbone"]["layer_0"]["mlp"]["up"]["weight"]
    trained = merged.params["backbone"]["layer_0"]["mlp"]["up"]["weight"]
    assert np.abs(trained.data - start.data).max() > 1e-3

    decoder = Decoder(merged.config, medusa_drafter(merged.heads, Tree.chain(2)), Greedy())
    state = decoder.prefill(merged.params, [[0, 5, 6]], max_new_tokens=9)
    (output,) = outputs(decoder.generate(merged.params, state))
    tokens = jax.numpy.asarray([[0, 5, 6, *output.token_ids]])
    assert tokens.shape == (1, 12)
    before = trained_logits(tmp_path / "run", tokens)
    assert np.argmax(before[0, 2:-1], -1).tolist() == output.token_ids
    backbone: Any = Backbone(merged.config)
    variables = {"params": merged.params["backbone"]}
    positions = jax.numpy.arange(12)[None]
    hidden, _ = backbone.apply(variables, tokens, positions, causal_mask(12))
    after = backbone.apply(variables, hidden, method="unembed")
    np.testing.assert_allclose(after, before, atol=1e-4)


@pytest.mark.e2e
@pytest.mark.slow
def test_truncated_heads_through_both_stages_to_vllm(place: Path, tmp_path: Path):
    """The map is chosen once, from the data; a resumed run and a second stage keep it.

    Heads for all tokens that share the lm_head can be those that the first stage begins with.
    """
    flags = ["--config.heads.shared=True", "--config.optim.steps=3"]
    code, err = train(place, tmp_path / "whole", *flags)
    assert code == 0, err
    flags += ["--config.heads.truncated=12", f"--config.heads.path={tmp_path / 'whole'}"]
    code, err = train(place, tmp_path / "one", *flags)
    assert code == 0, err
    ids = json.loads((tmp_path / "one/data.json").read_text())["token_map"]
    assert len(set(ids)) == 12 and set(ids) != set(range(12))
    assert train(place, tmp_path / "one", *flags)[0] == 0  # resumes, and has nothing to do
    flags += ["--config.mode=medusa2", f"--config.heads.path={tmp_path / 'one'}"]
    code, err = train(place, tmp_path / "two", *flags)
    assert code == 0, err

    merged = load_model(tmp_path / "two/model")
    assert (merged.heads.truncated, merged.heads.shared) == (12, True)
    assert merged.params["heads"]["token_map"].tolist() == ids
    # Shared rows are those of the lm_head as it was trained.
    rows = merged.params["backbone"]["lm_head"].rows(np.array(ids))
    chex.assert_trees_all_equal(merged.params["heads"]["vocab"], rows)
    convert(str(tmp_path / "two/model"), "vllm", tmp_path / "vllm")
    served = load_model(tmp_path / "two/model", tmp_path / "vllm")
    chex.assert_trees_all_equal(served.params["heads"], merged.params["heads"])


@pytest.mark.e2e
@pytest.mark.slow
def test_pretraining_begins_with_random_weights_and_writes_a_model(place: Path, tmp_path: Path):
    flags = ["--config.mode=pretrain", "--config.model.random=true"]
    code, err = train(place, tmp_path / "run", *flags)
    assert code == 0, err
    held_out = [line["eval_lm_loss"] for line in lines(tmp_path / "run") if "eval_lm_loss" in line]
    assert held_out[0] == pytest.approx(np.log(len(WORDS)), abs=0.1)  # knows nothing yet
    assert held_out[-1] < held_out[0] - 0.2
    model = load_model(tmp_path / "run/model")
    assert model.heads.num_heads == 0
    assert "medusa" not in (tmp_path / "run/model/config.json").read_text()


def trained_logits(workdir: Path, tokens: Any) -> Any:
    """Logits of the checkpoint itself, adapters beside the weights, as the trainer has them."""
    config = settings.from_dict(json.loads((workdir / "config.json").read_text()))
    weights = load(config, make_mesh(settings.Mesh(), jax.devices()[:1]), with_learnt=False)
    state = Checkpoints(workdir)._manager.restore(24)
    params = joined(state["trainable"], weights.frozen)
    scale = config.lora.alpha / config.lora.rank if config.adapted else 0.0
    backbone = params["backbone"]
    if config.adapted:
        backbone = lora.attached(backbone, params["adapters"], scale)
    batch = {"tokens": tokens, "segments": tokens * 0, "positions": jax.numpy.arange(12)[None]}
    hidden = scanned_backbone.hidden_states(weights.model, backbone, batch)
    return Backbone(weights.model).apply({"params": backbone}, hidden, method="unembed")


@pytest.mark.e2e
@pytest.mark.slow
def test_any_checkpoint_can_be_exported(finished: Path, tmp_path: Path):
    run = str(finished)
    export.run(export.Options(workdir=run, output=str(tmp_path / "last")))
    name = "heads/medusa_lm_head.safetensors"
    assert (tmp_path / "last" / name).read_bytes() == (finished / name).read_bytes()
    at16 = export.Options(workdir=run, output=str(tmp_path / "at16"), step=16)
    export.run(at16)
    assert (tmp_path / "at16" / name).read_bytes() != (finished / name).read_bytes()
    with pytest.raises(InputError, match="no checkpoint of step 5; it has 16, 20, 24"):
        export.run(export.Options(workdir=run, step=5))
    with pytest.raises(InputError, match="heads exists already"):
        export.run(at16)


BAD = {
    "unknown field": (["--config.optim.lerning_rate=1"], "did you mean 'optim.learning_rate'?"),
    "wrong type": (["--config.optim.batch_size=many"], "optim.batch_size"),
    "no dashes": (["config.optim.steps=5"], "not understood: config.optim.steps=5"),
    "no steps": (["--config.optim.steps=-5"], "optim.steps must be at least 0, got -5"),
    "dropout": (["--config.lora.dropout=1.0"], "lora.dropout is 1.0; expected 0 or more, and less"),
    "nothing held out": (["--config.data.eval_fraction=0"], "nothing to hold out"),
    "unknown mode": (["--config.mode=medusa3"], "mode is 'medusa3'; expected medusa1, medusa2"),
    "too long rows": (
        ["--config.data.sequence_length=65"],
        "data.sequence_length 65 exceeds the model's context of 64 tokens",
    ),
    "no such data": (["--config.data.train=('nowhere.txt',)"], "nowhere.txt does not exist"),
    "mesh": (["--config.mesh.data=3"], "needs 3 devices"),
    "pieces": (["--config.optim.accumulation=3"], "does not divide into"),
    "heads of another run": (["--config.heads.path=nowhere"], "nowhere does not exist"),
    "distilling heads alone": (["--config.loss.distill=true"], "needs mode 'medusa2'"),
    "batch": (["--config.optim.batch_size=5000"], "fewer than optim.batch_size 5000"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_get_one_message(place: Path, tmp_path: Path, name: str):
    flags, message = BAD[name]
    code, err = train(place, tmp_path / "run", *flags)
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


def test_nothing_left_to_learn_after_truncation(place: Path, tmp_path: Path):
    data = tmp_path / "long.jsonl"
    turns = [
        {"from": "human", "value": " ".join(["w1"] * 30)},
        {"from": "gpt", "value": " w2"},
    ]
    data.write_text((json.dumps({"conversations": turns}) + "\n") * 3)
    code, err = train(place, tmp_path / "run", f"--config.data.train=('{data}',)")
    assert code == 2
    assert "none has an assistant's token left within data.sequence_length 16" in err


@pytest.mark.e2e
@pytest.mark.slow
def test_the_step_compiles_for_devices_that_are_not_here(place: Path):
    command = [sys.executable, "train.py", "--config", place / "config.py"]
    done = subprocess.run(
        [*command, "--compile_only", "cpu:4", "--config.mesh.fsdp=4"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cpu:4 (data 1 x fsdp 4 x tensor 1):" in done.stdout
    assert "GiB per device" in done.stdout
    done = subprocess.run([*command, "--compile_only", "v9:2"], cwd=ROOT, capture_output=True)
    assert done.returncode == 2
    assert b"expected cpu:8, or v4, v5e" in done.stderr


CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_are_sound(name: str):
    file = ROOT / f"configs/{name}.py"
    config = read_config(str(file), [])
    settings.check(config)
    assert f"--config configs/{name}.py" in file.read_text()
    if config.model.shape:  # the others' models lie beside a maintainer's checkout
        model = model_shape(config, absent=True)
        assert config.data.sequence_length <= model.context
        plan(config, model, heads_shape(config, model))
