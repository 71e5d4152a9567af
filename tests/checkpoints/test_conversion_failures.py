"""What a dialect cannot hold is refused; failures leave nothing; little is held at once."""

import re
import resource
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.head_files import (
    LAYERS,
    NPZ,
    VOCAB,
    WIDTH,
    edit_config,
    edit_weights,
    heads_directory,
    original,
    random_heads,
    renamed,
)
from safetensors.numpy import load_file

from medusa_jax import convert
from medusa_jax.checkpoints import conversion, heads, tensors
from medusa_jax.checkpoints.heads import open_heads
from medusa_jax.checkpoints.load import load_model
from medusa_jax.checkpoints.stored_tensor import StoredTensor, Tensors
from medusa_jax.checkpoints.tensors import open_file, write_model, write_pickle
from medusa_jax.errors import InputError
from medusa_jax.files import OutputError

MAP = np.array([5, 3, 20, 0, 11])


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        conversion.convert(*arguments, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("tensors", "target", "message"),
    [
        (random_heads(2), "v2", "--to v2: there heads share the backbone's projection, and these"),
        (
            random_heads(2, vocab=None),
            "v0.1",
            "--to v0.1 stores the projection that these heads share: give the backbone with --base",
        ),
        (random_heads(2, vocab=None), "mlc", "--to mlc stores the projection"),
        (random_heads(2, 2, vocab=None), "tgi", "--to tgi stores the projection"),
        (
            random_heads(2, vocab=None),
            "vllm",
            "--to vllm stores the projection that these heads share: give the backbone with --base",
        ),
        (random_heads(2), "v1.0", "--to v1.0 holds the backbone too: give the backbone with"),
        (random_heads(2), "tgi", "--to tgi names the backbone, and "),
    ],
)
def test_refusals(tmp_path: Path, tensors: NPZ, target: str, message: str):
    first = original(tmp_path / "first", tensors)
    assert message in refusal(str(first), target, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["first"]


def test_truncated_heads_need_the_size_of_the_vocabulary(tmp_path: Path, saved: Path):
    theirs = renamed(random_heads(2, vocab=len(MAP)), "vllm", 2, 1) | {"token_map": MAP}
    first = heads_directory(tmp_path / "first", theirs)
    for target in ("vllm", "v0.1"):
        assert refusal(str(first), target, tmp_path / "out") == (
            f"--to {target} needs the size of the vocabulary, and these heads are truncated: "
            "give the backbone with --base"
        )
    message = refusal(str(first), "modelopt", tmp_path / "out", base=str(saved), as_is=True)
    assert message == "--to modelopt --as_is: this dialect has no place for a token_map"


@pytest.mark.parametrize("heads", [random_heads(2, 2), random_heads(2, 3, vocab=None)])
@pytest.mark.parametrize("target", ["v0.1", "v1.0", "v2"])
def test_blocks_that_the_original_would_repeat_are_refused(
    go: Any, saved: Path, tmp_path: Path, caplog: Any, target: str, heads: NPZ
):
    """The original makes one block and puts it into the list again and again."""
    if target == "v2":
        heads = {name: tensor for name, tensor in heads.items() if "linear" in name}
    first = original(tmp_path / "first", heads)
    message = refusal(str(first), target, tmp_path / "out", base=str(saved))
    assert "the original builds a head of a single block, repeated, and these heads have" in message
    assert message.endswith("; --as_is writes them for medusa_jax")
    assert not (tmp_path / "out").exists()
    go(first, target, as_is=True)
    assert "the original builds a head of a single block, repeated" in caplog.text
    tied = {name: heads[re.sub(r"\.[12]\.linear", ".0.linear", name)] for name in heads}
    go(original(tmp_path / "tied", tied), target)


@pytest.mark.parametrize("target", ["v2", "tgi"])
def test_a_projection_of_all_heads_must_be_the_backbones(
    go: Any, copy: Path, tmp_path: Path, target: str
):
    first = original(tmp_path / "first", random_heads(2, vocab=None))
    place = go(first, "vllm", base=str(copy), dtype="float16")  # compared as rounded
    assert "give the backbone with --base" in refusal(str(place), target, tmp_path / "out")
    go(place, target, base=str(copy))
    edit_weights(
        copy / "model.safetensors", lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1}
    )
    message = refusal(str(place), target, tmp_path / "out", base=str(copy))
    assert message == (
        f"--to {target}: the projection that these heads share is not that of {copy}; "
        "vllm can hold it"
    )
    assert not (tmp_path / "out").exists()


def test_backbones_that_do_not_fit(tmp_path: Path, saved: Path, copy: Path):
    wide = original(tmp_path / "wide", random_heads(1, width=WIDTH + 2))
    message = refusal(str(wide), "v1.0", tmp_path / "out", base=str(saved))
    assert f"made for hidden size {WIDTH + 2}, the model has {WIDTH}" in message
    large = original(tmp_path / "large", random_heads(1, vocab=VOCAB + 2))
    message = refusal(str(large), "modelopt", tmp_path / "out", base=str(saved))
    assert f"made for a vocabulary of {VOCAB + 2}, the model has {VOCAB}" in message
    good = original(tmp_path / "good", random_heads(1))
    edit_weights(
        copy / "model.safetensors",
        lambda old: {name: one for name, one in old.items() if name != "lm_head.weight"},
    )
    message = refusal(str(good), "v1.0", tmp_path / "out", base=str(copy))
    assert "missing lm_head.weight [24, 16]" in message
    edit_config(copy, tie_word_embeddings=True)
    conversion.convert(str(good), "v1.0", tmp_path / "out", base=str(copy))


def test_an_output_that_exists_is_refused(tmp_path: Path):
    first = original(tmp_path / "first", random_heads(1))
    before = {file: file.read_bytes() for file in first.iterdir()}
    message = refusal(str(first), "v0.1", first)
    assert message == f"{first} exists already; give another --output"
    assert {file: file.read_bytes() for file in first.iterdir()} == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = original(tmp_path / "first", random_heads(2))

    def call(*flags: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            convert.main([*map(str, flags)])
        out = capsys.readouterr()
        return int(done.value.code or 0), out.out, out.err

    flags = ("--input", first, "--from", "v0.1", "--output", tmp_path / "out")
    code, out, _ = call(*flags, "--to", "mlc", "--dtype", "bfloat16")
    assert (code, out) == (
        0,
        f"found v0.1 in {first / 'medusa_lm_head.safetensors'}: 2 heads, residual blocks in each: "
        "1, width 16, projections of their own to 24 tokens, float32\n"
        f"wrote mlc to {tmp_path / 'out'}: 6 tensors, 0.0 MB, all compared\n",
    )
    code, _, err = call(*flags, "--to", "mlc")
    assert (code, err) == (2, f"error: {tmp_path / 'out'} exists already; give another --output\n")
    with pytest.raises(SystemExit, match="2"):
        convert.main(["--input", "x", "--output", "y", "--to", "trtllm"])


@pytest.mark.parametrize("spoil", ["byte", "name", "pickle"])
def test_what_was_written_wrongly_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
):
    first = original(tmp_path / "first", random_heads(2), base_model_name_or_path="a/b")
    write, pickle = write_model, write_pickle

    def spoilt(directory: Path, stem: str, *rest: Any, **options: Any) -> None:
        write(directory, stem, *rest, **options)
        file = directory / f"{stem}.safetensors"
        if spoil == "byte":
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        elif spoil == "name":
            edit_weights(file, lambda old: old | {"2.0.linear.weight": old["0.0.linear.weight"],
                                                  "2.0.linear.bias": old["0.0.linear.bias"],
                                                  "2.1.weight": old["0.1.weight"]})  # fmt: skip

    def spoilt_pickle(file: Path) -> Path | None:
        written = pickle(file)
        if spoil == "pickle":
            state = torch.load(file.with_suffix(".pt"))
            state["1.1.weight"][3, 4] += 1
            torch.save(state, file.with_suffix(".pt"))
        return written

    monkeypatch.setattr(conversion, "write_model", spoilt)
    monkeypatch.setattr(conversion, "write_pickle", spoilt_pickle)
    with pytest.raises(RuntimeError, match=r"went wrong|is not what was to be written"):
        conversion.convert(str(first), "v0.1", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["first"]


@pytest.mark.parametrize(
    ("target", "limit", "file"),
    [
        ("mlc", 2000, "model.safetensors"),
        ("v0.1", 6000, "medusa_lm_head.pt"),
        ("hf", 20_000, "model.safetensors"),
    ],
)
def test_a_full_disk_leaves_nothing_and_is_said(
    go: Any, tmp_path: Path, saved: Path, target: str, limit: int, file: str
):
    """A limit on the size of files stands for the disk."""
    first = original(tmp_path / "first", random_heads(2), base_model_name_or_path="a/b")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OutputError, match="file too large") as error:
            go(saved if target == "hf" else first, target, base="")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value).endswith(f"-{target}.tmp/{file} could not be written: file too large")
    assert [place.name for place in tmp_path.iterdir()] == ["first"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (".", ". exists already; give another --output"),
        ("", "exists already"),
        ("{first}", "{first} exists already; give another --output"),
        ("{first}/config.json/out", "{first}/config.json is a file, not a directory"),
        ("/proc/nothing/out", "/proc/nothing/out could not be written: "),
    ],
)
def test_outputs_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: Any, capsys: Any, output: str, message: str
):
    first = original(tmp_path / "first", random_heads(1), base_model_name_or_path="a/b")
    output = output.replace("{first}", str(first))
    opened = []
    monkeypatch.setattr(conversion, "open_heads", lambda *a: opened.append(a) or open_heads(*a))
    with pytest.raises(SystemExit) as done:
        convert.main(["--input", str(first), "--to", "mlc", "--output", output])
    said = capsys.readouterr().err
    assert message.replace("{first}", str(first)) in said
    assert said.count("\n") == 1
    if output.startswith("/proc"):  # which only the system knows to refuse
        assert done.value.code == 1
    else:
        assert (done.value.code, opened) == (2, [])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch):
    """Counts what is read by file and name, and how many bytes of it are alive at most."""
    counted: Counter[tuple[str, str]] = Counter()
    alive, peak = [0], [0]
    opened = open_file

    def gone(size: int) -> None:
        alive[0] -= size

    def watched(file: Path, **how: bool) -> Tensors:
        def watch(name: str, tensor: StoredTensor) -> StoredTensor:
            def read(index: Any = ...) -> np.ndarray:
                array = tensor.read(index)
                counted[file.parent.name, name] += 1
                alive[0] += array.nbytes
                peak[0] = max(peak[0], alive[0])
                weakref.finalize(array, gone, array.nbytes)
                return array

            return StoredTensor(tensor.shape, tensor.dtype, read)

        return {name: watch(name, tensor) for name, tensor in opened(file, **how).items()}

    for module in (tensors, heads, conversion):
        monkeypatch.setattr(module, "open_file", watched)
    return counted, peak


def test_a_merge_reads_each_tensor_twice_and_holds_a_shard(
    saved: Path, tmp_path: Path, reads: Any, monkeypatch: pytest.MonkeyPatch
):
    counted, peak = reads
    monkeypatch.setattr(conversion, "SHARD_BYTES", 4000)
    first = original(tmp_path / "first", random_heads(2))
    conversion.convert(str(first), "v1.0", tmp_path / "out", base=str(saved))
    backbone = {(saved.name, name) for name in load_file(saved / "model.safetensors")}
    heads = {("first", name) for name in random_heads(2)}
    assert {key: n for key, n in counted.items() if not key[0].startswith("out")} == dict.fromkeys(
        backbone | heads, 2
    )
    written = [n for key, n in counted.items() if key[0].startswith("out")]
    assert written == [1] * len(backbone | heads)
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > LAYERS + 2
    assert peak[0] <= 4096  # a shard; to compare, two tensors of 2048 bytes at most


def test_heads_come_out_of_a_merged_model_without_its_backbone(go: Any, copy: Path, reads: Any):
    named = random_heads(2, prefix="medusa_head.")
    edit_weights(copy / "model.safetensors", lambda old: old | named)
    counted, _ = reads
    go(copy, "mlc", base="")
    assert {name for place, name in counted if place == copy.name} == named.keys()
    assert load_model(copy).heads.num_heads == 2
