"""GPTQ and AWQ directories: the weights that AutoAWQ 0.2.9 and GPTQModel 7.7.0 read from them."""

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.head_files import edit_config, one_by_one
from safetensors.torch import load_file

from medusa_jax.checkpoints.load import backbone_tensors, load_model
from medusa_jax.checkpoints.packed_weights import joined
from medusa_jax.checkpoints.stored_tensor import StoredTensor
from medusa_jax.errors import InputError
from medusa_jax.param_paths import flat

GROUP = 8
KINDS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
    "gptq, 8 bits": {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq"},
    "gptq, desc_act": {"quant_method": "gptq", "bits": 4, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
}


def packed(numbers: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Numbers [..., n] in int32 [..., n / 8], the lowest bits first; `order` as AWQ packs it."""
    parts = numbers.to(torch.int64).unflatten(-1, (-1, 32 // bits))
    if order:
        parts = parts[..., order]
    words = (parts << (bits * torch.arange(32 // bits))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def module(out: int, inner: int, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random tensors of a module by the ends of their names, and the weight that they mean."""
    bits, groups = KINDS[kind]["bits"], inner // GROUP
    q = torch.randint(0, 2**bits, (inner, out))
    zeros = torch.randint(1, 2**bits, (groups, out))
    scales = (torch.rand(groups, out) * 0.1).half()
    order = torch.arange(inner) // GROUP
    if "desc_act" in kind:
        order = order[torch.randperm(inner)]
    meant = (scales.float()[order] * (q - zeros[order])).T.contiguous()
    if kind == "awq":
        turn = [0, 2, 4, 6, 1, 3, 5, 7]
        words = {"qweight": packed(q, 4, turn), "qzeros": packed(zeros, 4, turn)}
        return words | {"scales": scales}, meant
    kept = zeros if kind == "gptq_v2" else zeros - 1
    weights = packed(q.T.contiguous(), bits).T.contiguous()
    tensors = {"qweight": weights, "qzeros": packed(kept, bits), "scales": scales}
    return tensors | {"g_idx": order.to(torch.int32)}, meant


def quantized(saved: Path, copy: Path, kind: str) -> tuple[Path, Path]:
    """Copies of the model: one quantized, one with the weights that are meant."""
    torch.manual_seed(0)
    tensors, meant = {}, {}
    for name, weight in load_file(saved / "model.safetensors").items():
        tensors[name] = meant[name] = weight
        if name.endswith("proj.weight"):
            del tensors[name]
            parts, meant[name] = module(*weight.shape, kind)
            tensors |= {name.replace("weight", part): one for part, one in parts.items()}
    safetensors.torch.save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    whole = copy.parent / "whole"
    whole.mkdir()
    (whole / "config.json").write_text((copy / "config.json").read_text())
    safetensors.torch.save_file(meant, whole / "model.safetensors", {"format": "pt"})
    edit_config(copy, quantization_config=KINDS[kind])
    return copy, whole


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_the_libraries_mean(saved: Path, copy: Path, kind: str):
    narrow, whole = quantized(saved, copy, kind)
    for name, tensor in backbone_tensors(whole).items():
        ours = backbone_tensors(narrow)[name]
        np.testing.assert_allclose(ours.read(), tensor.read(), rtol=1e-6)
        part = tuple(slice(3, 7) for _ in tensor.shape)  # begins and ends inside an int32
        np.testing.assert_allclose(ours.read(part), tensor.read(part), rtol=1e-6)
    model = load_model(narrow)
    keeps = kind in ("gptq", "gptq_v2", "awq")
    assert model.precision == ("int8" if keeps else "float32")
    params, theirs = (flat(one_by_one(m.params["backbone"])) for m in (model, load_model(whole)))
    for path in ("layer_0/attention/query_key_value/weight", "layer_1/mlp/down/weight"):
        weight = params[path]
        assert (weight.data.dtype.itemsize == 1) == keeps
        into = weight.data.shape[-1 if weight.order == "out_in" else -2]
        x = jax.random.normal(jax.random.key(0), (3, into))
        np.testing.assert_allclose(weight.dot(x), theirs[path].dot(x), rtol=1e-3, atol=1e-3)


def test_numbers_of_the_libraries():
    """Outputs, or inputs, 0 to 7 in an int32, as AutoAWQ's `from_linear` and `pack_exllama` say."""
    awq = {"qweight": np.array([[0x75316420]], np.int32), "qzeros": np.zeros((1, 1), np.int32)}
    gptq = {"qweight": np.full((1, 8), 0x76543210, np.int32), "qzeros": np.zeros((1, 1), np.int32)}
    scales = {"scales": np.ones((1, 8), np.float16)}
    (one,) = joined(stored(awq | scales), {"quantization_config": KINDS["awq"]}, "x").values()
    np.testing.assert_array_equal(one.read(), np.arange(8)[:, None])
    (one,) = joined(stored(gptq | scales), {"quantization_config": KINDS["gptq_v2"]}, "x").values()
    np.testing.assert_array_equal(one.read(), [np.arange(8)] * 8)
    (one,) = joined(stored(gptq | scales), {"quantization_config": KINDS["gptq"]}, "x").values()
    np.testing.assert_array_equal(one.read(), [np.arange(-1, 7)] * 8)  # zero points lack 1


def stored(arrays: dict[str, np.ndarray]) -> dict[str, StoredTensor]:
    return {
        f"a.{name}": StoredTensor(
            array.shape, str(array.dtype), lambda index=..., array=array: array[index]
        )
        for name, array in arrays.items()
    }


GOOD = {
    "qweight": np.zeros((1, 8), np.int32),
    "qzeros": np.zeros((1, 1), np.int32),
    "scales": np.ones((1, 8), np.float16),
}


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        ({}, {"bits": 3}, "GPTQ of the format 'gptq' with 3 bits is not supported"),
        ({}, {"quant_method": "awq", "version": "gemv"}, "AWQ of the format 'gemv' with 4 bits"),
        ({}, {"checkpoint_format": "marlin"}, "expected gptq, gptq_v2 with 4 bits or 8 bits"),
        ({"qzeros": None}, {}, "a.qweight has no a.qzeros beside it"),
        ({"qzeros": np.zeros((1, 2), np.int32)}, {}, r"shapes that do not fit: .*int32 \[1, 2\]"),
        ({"scales": np.ones((3, 8))}, {}, "shapes that do not fit"),
        ({"qweight": np.zeros((0, 8), np.int32)}, {}, "shapes that do not fit"),
        ({"scales": np.ones((0, 8)), "qzeros": np.zeros((0, 1), np.int32)}, {}, "do not fit"),
        ({"qweight": np.zeros((1, 8))}, {}, "shapes that do not fit"),
        ({"g_idx": np.zeros(7, np.int32)}, {}, "shapes that do not fit"),
        ({"g_idx": np.full(8, 9, np.int32)}, {}, r"g_idx names groups beyond 0\.\.0"),
    ],
)
def test_what_is_not_read_is_refused(arrays: dict, settings: dict, message: str):
    arrays = {name: one for name, one in (GOOD | arrays).items() if one is not None}
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4} | settings}
    with pytest.raises(InputError, match=message):
        joined(stored(arrays), settings, "config.json")
