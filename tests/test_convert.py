"""Conversion: nothing but names changes, what does not fit is refused, failures leave nothing."""

import errno
import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import (
    LAYERS,
    NPZ,
    VOCAB,
    WIDTH,
    assert_same,
    edit_config,
    edit_weights,
    heads_directory,
    heads_file,
    random_heads,
    renamed,
)
from safetensors.numpy import load_file, save_file

from medusa_jax import cli, convert, hf, tensor_files
from medusa_jax.decode import Decoder, outputs
from medusa_jax.errors import InputError
from medusa_jax.heads import MedusaHeads
from medusa_jax.hf import Model, load_model
from medusa_jax.tree import Tree

OWN = ["v0.1", "v1.0", "tgi", "vllm", "mlc", "modelopt"]
SHARED = ["v2", "v1.0", "tgi", "vllm"]
MAP = np.array([5, 3, 20, 0, 11])


@pytest.fixture
def go(saved: Path, tmp_path: Path):
    """Converts to a new directory and returns it."""

    def call(source: Path, target: str, **options: Any) -> Path:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}-{target}"
        convert.convert(str(source), target, output, **({"base": str(saved)} | options))
        return output

    return call


def original(place: Path, tensors: NPZ, **config: Any) -> Path:
    """A v0.1 or v2 directory."""
    place.mkdir()
    heads_file(place, tensors)
    (place / "config.json").write_text(json.dumps(config))
    return place


def typed(tensors: NPZ, kind: Any) -> NPZ:
    return {name: tensor.astype(kind) for name, tensor in tensors.items()}


# --- round trips


@pytest.mark.parametrize(
    ("layers", "kind"), [(1, np.float32), (2, ml_dtypes.bfloat16), (1, np.float16)]
)
def test_own_projections_through_every_pair_of_dialects(
    go: Any, tmp_path: Path, layers: int, kind: Any
):
    tensors = typed(random_heads(3, layers), kind)
    first = original(tmp_path / "first", tensors)
    for one in OWN:
        place = go(first, one)
        for other in OWN:
            back = go(go(place, other), "v0.1")
            assert_same(load_file(back / "medusa_lm_head.safetensors"), tensors)


@pytest.mark.parametrize("layers", [1, 2])
def test_shared_heads_through_every_pair_of_dialects(go: Any, tmp_path: Path, layers: int):
    tensors = typed(random_heads(3, layers, vocab=None), np.float16)
    first = original(tmp_path / "first", tensors)
    dialects = [name for name in SHARED if name != "tgi" or layers == 1]
    for one in dialects:
        place = go(first, one)
        for other in dialects:
            back = go(go(place, other), "v2")
            assert_same(load_file(back / "medusa_lm_head.safetensors"), tensors)


@pytest.mark.parametrize("shared", [True, False])
def test_truncated_heads(go: Any, tmp_path: Path, shared: bool):
    tensors = random_heads(2, 2, vocab=None if shared else len(MAP))
    theirs = renamed(tensors, "vllm", 2, 2) | {"token_map": MAP}
    if shared:
        theirs["lm_head.weight"] = random_heads(1, vocab=len(MAP))["0.1.weight"]
    theirs = {n: t if n == "token_map" else t.astype(np.float16) for n, t in theirs.items()}
    first = heads_directory(tmp_path / "first", theirs, vocab_size=VOCAB)
    again = go(first, "vllm")
    assert_same(load_file(again / "model.safetensors"), theirs)
    settings = json.loads((again / "config.json").read_text())
    assert (settings["vocab_size"], settings["truncated_vocab_size"]) == (VOCAB, len(MAP))
    halves = load_file(go(again, "vllm", dtype="bfloat16") / "model.safetensors")
    assert halves.pop("token_map").tolist() == MAP.tolist()
    assert {str(tensor.dtype) for tensor in halves.values()} == {"bfloat16"}


def test_a_truncated_projection_that_is_the_backbones_is_written_out(
    go: Any, saved: Path, tmp_path: Path
):
    theirs = renamed(random_heads(2, vocab=None), "vllm", 2, 1) | {"token_map": MAP}
    written = go(heads_directory(tmp_path / "first", theirs, vocab_size=VOCAB), "vllm")
    expected = load_file(saved / "model.safetensors")["lm_head.weight"][MAP]
    np.testing.assert_array_equal(
        load_file(written / "model.safetensors")["lm_head.weight"], expected
    )


@pytest.mark.parametrize("shared", [True, False])
def test_truncated_heads_of_our_trainer_go_to_vllm(
    go: Any, saved: Path, tmp_path: Path, shared: bool
):
    tensors = random_heads(2, vocab=None if shared else len(MAP)) | {"token_map": MAP}
    first = original(tmp_path / "first", tensors)
    place = go(first, "vllm")
    settings = json.loads((place / "config.json").read_text())
    assert (settings["vocab_size"], settings["truncated_vocab_size"]) == (VOCAB, len(MAP))
    chex.assert_trees_all_equal(load_model(saved, place).params, load_model(saved, first).params)


def test_tensorrt_llm_to_the_original(go: Any, tmp_path: Path):
    tensors = random_heads(2)
    place = heads_directory(tmp_path / "trt", {"x": np.ones(1)}, mapping={"tp_size": 2})
    for rank in range(2):
        theirs = renamed(tensors, "trtllm", 2, 1)
        half = {name: np.split(tensor, 2)[rank].copy() for name, tensor in theirs.items()}
        save_file(half, place / f"rank{rank}.safetensors")
    assert_same(load_file(go(place, "v0.1") / "medusa_lm_head.safetensors"), tensors)


def test_each_tensor_keeps_its_own_type(go: Any, saved: Path, tmp_path: Path):
    kinds = [np.float16, ml_dtypes.bfloat16, np.float32]
    tensors = {
        name: tensor.astype(kinds[i % 3])
        for i, (name, tensor) in enumerate(random_heads(3).items())
    }
    first = original(tmp_path / "first", tensors)
    merged = load_file(go(first, "v1.0") / "model.safetensors")
    backbone = load_file(saved / "model.safetensors")
    assert_same(merged, backbone | {f"medusa_head.{name}": t for name, t in tensors.items()})
    rounded = load_file(go(first, "v0.1", dtype="float16") / "medusa_lm_head.safetensors")
    assert_same(rounded, typed(tensors, np.float16))


# --- what others read


def test_a_vllm_directory_is_what_vllm_documents(go: Any, tmp_path: Path):
    first = original(tmp_path / "first", random_heads(2, 1))
    place = go(first, "vllm", base="")
    assert {file.name for file in place.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((place / "config.json").read_text()) == {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": 16,
        "vocab_size": 24,
        "num_heads": 2,
        "num_hidden_layers": 1,
        "max_paths": 64,
        "topk": 10,
        "truncated_vocab_size": 24,
        "original_lm_head": False,
        "medusa_fc_bias": True,
        "logit_scale": 1.0,
    }
    shapes = {name: t.shape for name, t in load_file(place / "model.safetensors").items()}
    assert shapes == {
        "blocks.0.layers.0.weight": (16, 16),
        "blocks.0.layers.0.bias": (16,),
        "blocks.1.layers.0.weight": (16, 16),
        "blocks.1.layers.0.bias": (16,),
        "lm_heads.0.weight": (24, 16),
        "lm_heads.1.weight": (24, 16),
    }
    shared = go(original(tmp_path / "second", random_heads(1, 2, vocab=None)), "vllm")
    settings = json.loads((shared / "config.json").read_text())
    assert settings["original_lm_head"] is True
    assert (settings["vocab_size"], settings["num_hidden_layers"]) == (24, 2)
    assert {name: t.shape for name, t in load_file(shared / "model.safetensors").items()} == {
        "blocks.0.layers.0.weight": (16, 16),
        "blocks.0.layers.0.bias": (16,),
        "blocks.0.layers.1.weight": (16, 16),
        "blocks.0.layers.1.bias": (16,),
        "lm_head.weight": (24, 16),
    }


@pytest.mark.parametrize(
    ("vocab", "projections"), [(VOCAB, {"0.1.weight", "1.1.weight"}), (None, set())]
)
def test_a_tgi_directory_is_what_tgi_documents(
    go: Any, tmp_path: Path, vocab: int | None, projections: set[str]
):
    first = original(tmp_path / "first", random_heads(2, 1, vocab=vocab))
    place = go(first, "tgi", base="owner/name")
    assert {file.name for file in place.iterdir()} == {"config.json", "medusa_lm_head.safetensors"}
    assert json.loads((place / "config.json").read_text()) == {  # no "architectures"
        "base_model_name_or_path": "owner/name",
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
    }
    assert load_file(place / "medusa_lm_head.safetensors").keys() == projections | {
        "0.0.linear.weight",
        "0.0.linear.bias",
        "1.0.linear.weight",
        "1.0.linear.bias",
    }


CONFIGS = {
    "v0.1": {
        "base_model_name_or_path": "some/model",
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
    },
    "mlc": {
        "model_type": "medusa",
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "hidden_size": WIDTH,
        "vocab_size": VOCAB,
    },
}


@pytest.mark.parametrize("target", list(CONFIGS))
def test_configs_of_heads_alone(go: Any, tmp_path: Path, target: str):
    first = original(tmp_path / "first", random_heads(2), base_model_name_or_path="some/model")
    place = go(first, target, base="")
    assert json.loads((place / "config.json").read_text()) == CONFIGS[target]
    if target == "v0.1":
        both = (place / f"medusa_lm_head.{end}" for end in ("pt", "safetensors"))
        chex.assert_trees_all_equal(
            *({name: t.read() for name, t in tensor_files.open_file(one).items()} for one in both)
        )


def test_configs_of_merged_models(go: Any, saved: Path, tmp_path: Path):
    settings = json.loads((saved / "config.json").read_text())
    first = original(tmp_path / "first", random_heads(2))
    merged = go(first, "v1.0")
    counted = {"medusa_num_heads": 2, "medusa_num_layers": 1}
    assert json.loads((merged / "config.json").read_text()) == settings | counted
    other = go(merged, "modelopt", base="", dtype="bfloat16")  # its own backbone
    found = json.loads((other / "config.json").read_text())
    medusa = {"num_medusa_heads": 2, "num_medusa_layers": 1}
    settings.pop("dtype", None)
    assert found == settings | {"medusa": medusa, "torch_dtype": "bfloat16"}
    assert (other / "generation_config.json").read_bytes() == (
        saved / "generation_config.json"
    ).read_bytes()
    heads = go(other, "v0.1", base="")
    named = json.loads((heads / "config.json").read_text())["base_model_name_or_path"]
    assert named == str(other.resolve())


def test_a_backbone_beside_the_heads_is_named_by_its_path(go: Any, copy: Path, tmp_path: Path):
    first = original(tmp_path / "first", random_heads(2), base_model_name_or_path=copy.name)
    (tmp_path / "elsewhere").mkdir()
    output = tmp_path / "elsewhere" / "heads"
    convert.convert(str(first), "v0.1", output)
    assert json.loads((output / "config.json").read_text())["base_model_name_or_path"] == str(copy)
    chex.assert_trees_all_equal(load_model(output).params, load_model(first).params)


class Blocks(torch.nn.Module):
    """x <- x + SiLU(W x + b), under vLLM's names."""

    def __init__(self, layers: int):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.nn.functional.silu(layer(x))
        return x


class Heads(torch.nn.Module):
    """Heads with their own projections, under vLLM's names."""

    def __init__(self, heads: int, layers: int):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Blocks(layers) for _ in range(heads))
        linears = (torch.nn.Linear(WIDTH, VOCAB, bias=False) for _ in range(heads))
        self.lm_heads = torch.nn.ModuleList(linears)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(self.blocks, self.lm_heads, strict=True)
        return [head(block(x)) for block, head in pairs]


def test_a_torch_module_with_vllms_names_gives_our_logits(go: Any, saved: Path, tmp_path: Path):
    tensors = {name: 0.3 * tensor for name, tensor in random_heads(2, 2).items()}
    first = original(tmp_path / "first", tensors)
    theirs = Heads(2, 2)
    state = load_file(go(first, "vllm") / "model.safetensors")
    theirs.load_state_dict({name: torch.from_numpy(t) for name, t in state.items()}, strict=True)
    model = load_model(saved, first)
    hidden = np.random.default_rng(2).standard_normal((5, WIDTH), np.float32)
    variables = {"params": model.params["heads"]}
    ours = MedusaHeads(model.heads).apply(variables, jnp.asarray(hidden), lambda x: x)
    with torch.no_grad():
        expected = [logits.numpy() for logits in theirs(torch.from_numpy(hidden))]
    np.testing.assert_allclose(jax.device_get(ours), expected, rtol=1e-4, atol=1e-5)


def test_vllms_own_config_reads_it(go: Any, tmp_path: Path):
    medusa = pytest.importorskip("vllm.transformers_utils.configs.medusa", reason="needs vllm")
    config = medusa.MedusaConfig.from_pretrained(
        go(original(tmp_path / "first", random_heads(3, 2)), "vllm")
    )
    assert (config.num_heads, config.num_hidden_layers, config.vocab_size) == (3, 2, VOCAB)


# --- the real heads


def test_recorded_runs_come_out_after_three_conversions(
    go: Any, shared: Path, stories: Model, golden: list[dict[str, Any]]
):
    place = shared / "models/stories260K-medusa"
    for target in ("vllm", "mlc", "modelopt", "v1.0", "tgi", "v0.1"):
        place = go(place, target, base=str(shared / "models/stories260K"))
    file = "medusa_lm_head.safetensors"
    assert_same(load_file(place / file), load_file(shared / "models/stories260K-medusa" / file))
    model = load_model(place)
    chex.assert_trees_all_equal(model.params, stories.params)
    records = [one for one in golden if (one.get("tree"), one["mode"]) == ("chain4", "greedy")]
    decoder = Decoder(model.config, model.heads, Tree.chain(4))
    state = decoder.prefill(
        model.params,
        [record["prompt_ids"] for record in records],
        max_new_tokens=[len(record["output_ids"]) for record in records],
    )
    results = outputs(decoder.generate(model.params, state))
    for record, result in zip(records, results, strict=True):
        assert result.token_ids == record["output_ids"]
        assert result.tokens_per_step == record["tokens_per_step"]


def test_the_merged_real_model(go: Any, shared: Path):
    """Its `.bin` shards of float16 become safetensors, and its heads come out alone."""
    source = shared / "models/stories260K-medusa-1.0"
    again = go(source, "v1.0", base="")
    chex.assert_trees_all_equal(load_model(again).params, load_model(source).params)
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (source / name).read_bytes()
    heads = load_file(go(source, "v0.1", base="") / "medusa_lm_head.safetensors")
    whole = load_file(shared / "models/stories260K-medusa/medusa_lm_head.safetensors")
    assert_same(heads, typed(whole, np.float16))


# --- what is refused


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        convert.convert(*arguments, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("tensors", "target", "message"),
    [
        (random_heads(2), "v2", "--to v2: there heads share the backbone's projection, and these"),
        (
            random_heads(2, vocab=None),
            "v0.1",
            "--to v0.1: there each head has its own projection, and these heads share one; "
            "v2, v1.0, tgi, vllm can hold them",
        ),
        (random_heads(2, vocab=None), "mlc", "--to mlc: there each head has its own projection"),
        (random_heads(2, vocab=None), "modelopt", "--to modelopt: there each head has its own"),
        (
            random_heads(2, 2, vocab=None),
            "tgi",
            "--to tgi: TGI reads shared heads of one block only, these have 2",
        ),
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


@pytest.mark.parametrize("target", ["v0.1", "v2", "v1.0", "tgi", "mlc", "modelopt"])
def test_truncated_heads_go_to_vllm_only(tmp_path: Path, saved: Path, target: str):
    theirs = renamed(random_heads(2, vocab=len(MAP)), "vllm", 2, 1) | {"token_map": MAP}
    first = heads_directory(tmp_path / "first", theirs)
    message = refusal(str(first), target, tmp_path / "out", base=str(saved))
    assert message == (
        f"--to {target}: its readers know no token_map, and these heads guess only 5 of the "
        "tokens; vllm can hold them"
    )
    message = refusal(str(first), "vllm", tmp_path / "out")
    assert message == (
        "--to vllm says the size of the vocabulary, and these heads are truncated: "
        "give the backbone with --base"
    )


@pytest.mark.parametrize("target", ["v2", "tgi", "v1.0"])
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
    assert message == f"{copy} has no lm_head.weight"
    edit_config(copy, tie_word_embeddings=True)
    convert.convert(str(good), "v1.0", tmp_path / "out", base=str(copy))


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
            cli.run(convert.main, convert.parse([*map(str, flags)]))
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
        convert.parse(["--input", "x", "--output", "y", "--to", "trtllm"])


# --- failures and memory


@pytest.mark.parametrize("spoil", ["byte", "name", "pickle"])
def test_what_was_written_wrongly_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
):
    first = original(tmp_path / "first", random_heads(2), base_model_name_or_path="a/b")
    write, write_pickle = tensor_files.write_model, tensor_files.write_pickle

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

    def spoilt_pickle(file: Path) -> None:
        write_pickle(file)
        if spoil == "pickle":
            state = torch.load(file.with_suffix(".pt"))
            state["1.1.weight"][3, 4] += 1
            torch.save(state, file.with_suffix(".pt"))

    monkeypatch.setattr(tensor_files, "write_model", spoilt)
    monkeypatch.setattr(tensor_files, "write_pickle", spoilt_pickle)
    with pytest.raises(RuntimeError, match=r"went wrong|is not what was to be written"):
        convert.convert(str(first), "v0.1", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["first"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = original(tmp_path / "first", random_heads(2))

    def full(_: Any, file: Path, *__: Any) -> None:
        file.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert.convert(str(first), "mlc", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["first"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch):
    """Counts what is read by file and name, and how many bytes of it are alive at most."""
    counted: Counter[tuple[str, str]] = Counter()
    alive, peak = [0], [0]
    opened = tensor_files.open_file

    def gone(size: int) -> None:
        alive[0] -= size

    def watched(file: Path) -> tensor_files.Tensors:
        def watch(name: str, tensor: tensor_files.StoredTensor) -> tensor_files.StoredTensor:
            def read(index: Any = ...) -> np.ndarray:
                array = tensor.read(index)
                counted[file.parent.name, name] += 1
                alive[0] += array.nbytes
                peak[0] = max(peak[0], alive[0])
                weakref.finalize(array, gone, array.nbytes)
                return array

            return tensor_files.StoredTensor(tensor.shape, tensor.dtype, read)

        return {name: watch(name, tensor) for name, tensor in opened(file).items()}

    monkeypatch.setattr(tensor_files, "open_file", watched)
    return counted, peak


def test_a_merge_reads_each_tensor_twice_and_holds_a_shard(
    saved: Path, tmp_path: Path, reads: Any, monkeypatch: pytest.MonkeyPatch
):
    counted, peak = reads
    monkeypatch.setattr(convert, "SHARD_BYTES", 4000)
    first = original(tmp_path / "first", random_heads(2))
    convert.convert(str(first), "v1.0", tmp_path / "out", base=str(saved))
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
    assert hf.load_model(copy).heads.num_heads == 2
