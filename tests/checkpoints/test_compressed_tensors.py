"""Directories that are quantized already: the layouts that compressed-tensors 0.20 writes."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.head_files import edit_config, one_by_one
from safetensors.torch import load_file

from medusa_jax.checkpoints.compressed_tensors import joined
from medusa_jax.checkpoints.load import backbone_tensors, load_model
from medusa_jax.checkpoints.stored_tensor import StoredTensor
from medusa_jax.errors import InputError
from medusa_jax.model.weight import Weight
from medusa_jax.param_paths import flat

CONFIG = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": {"num_bits": 8}}},
    "ignore": ["lm_head"],
}
KINDS = {
    "int8, channels": ("int-quantized", "int8"),
    "fp8, tensors": ("float-quantized", "fp8"),
    "fp8, channels": ("float-quantized", "fp8"),
    "4 bits, groups": ("pack-quantized", "int4"),
    "8 bits, groups": ("pack-quantized", "int8"),
}
GROUP = 8


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers in the lowest bits of int32 first, stored plus half their range."""
    shifted = (values.to(torch.int64) + 2 ** (bits - 1)).reshape(len(values), -1, 32 // bits)
    words = (shifted << (bits * torch.arange(32 // bits))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def narrow(weight: torch.Tensor, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a module by the ends of their names, and the weight that they mean."""
    most = {"int8": 127, "fp8,": 448, "4 bi": 7, "8 bi": 127}[kind[:4]]
    if "groups" in kind:
        wide = weight.reshape(len(weight), -1, GROUP)
        scale = wide.abs().amax(-1) / most
        values = (wide / scale[..., None]).round().to(torch.int8)
        bits = int(kind[0])
        tensors = {"packed": pack(values.reshape(weight.shape), bits), "scale": scale}
        tensors["shape"] = torch.tensor(weight.shape)
        return tensors, (values * scale[..., None]).reshape(weight.shape)
    scale = weight.abs().amax(1, keepdim=True) if "channels" in kind else weight.abs().max()[None]
    scale = (scale / most).to(torch.bfloat16)
    values = weight / scale.float()
    values = values.to(torch.float8_e4m3fn) if "fp8" in kind else values.round().to(torch.int8)
    tensors = {"": values, "scale": scale, "input": torch.ones(1)}
    return tensors, values.float() * scale.float()


def quantized(saved: Path, copy: Path, kind: str) -> tuple[Path, Path]:
    """Copies of the model: one quantized, one with the weights that are meant."""
    tensors, meant = {}, {}
    for name, weight in load_file(saved / "model.safetensors").items():
        tensors[name] = meant[name] = weight
        if name.endswith("proj.weight"):
            del tensors[name]
            parts, meant[name] = narrow(weight, kind)
            names = {"": name, "input": name.replace("weight", "input_scale")}
            tensors |= {names.get(part, f"{name}_{part}"): one for part, one in parts.items()}
    safetensors.torch.save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    whole = copy.parent / "whole"
    whole.mkdir()
    (whole / "config.json").write_text((copy / "config.json").read_text())
    safetensors.torch.save_file(meant, whole / "model.safetensors", {"format": "pt"})
    edit_config(copy, quantization_config=CONFIG | {"format": KINDS[kind][0]})
    return copy, whole


@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_narrow_and_mean_the_same(saved: Path, copy: Path, caplog, kind: str):
    narrow, whole = quantized(saved, copy, kind)
    for name, tensor in backbone_tensors(whole).items():
        ours = backbone_tensors(narrow)[name]
        np.testing.assert_allclose(ours.read(), tensor.read(), rtol=1e-6)
        part = tuple(slice(1, 3) for _ in tensor.shape)
        np.testing.assert_allclose(ours.read(part), tensor.read(part), rtol=1e-6)
    with caplog.at_level(logging.WARNING):
        model = load_model(narrow)
    assert "only weights are quantized" in caplog.text
    assert model.precision == KINDS[kind][1]
    params, theirs = (flat(one_by_one(m.params["backbone"])) for m in (model, load_model(whole)))
    for path in ("layer_0/attention/query_key_value/weight", "layer_1/mlp/down/weight"):
        weight = params[path]
        assert isinstance(weight, Weight) and weight.data.dtype.itemsize == 1
        into = weight.data.shape[-1 if weight.order == "out_in" else -2]
        x = jax.random.normal(jax.random.key(0), (3, into))
        np.testing.assert_allclose(weight.dot(x), theirs[path].dot(x), rtol=1e-3, atol=1e-3)
    assert params["lm_head"].data.dtype == jnp.float32
    more = flat(one_by_one(load_model(narrow, quantize="int8").params["backbone"]))
    assert more["lm_head"].data.dtype == jnp.int8
    np.testing.assert_array_equal(more[path].data, params[path].data)


@pytest.mark.parametrize(
    ("words", "numbers", "dtype"),
    [([1985229328, -19088744], range(-8, 8), "int4"), ([-8356096], (-128, -1, 0, 127), "int8")],
)
def test_packed_numbers_of_the_library(words: list[int], numbers, dtype: str):
    """`pack_to_int32` of compressed-tensors 0.20.0, recorded."""
    arrays = {
        "packed": np.array([words], np.int32),
        "shape": np.array([1, len(numbers)]),
        "scale": np.ones((1, 1), np.float32),
    }
    tensors = {
        f"a.weight_{part}": StoredTensor(
            array.shape, str(array.dtype), lambda index=..., array=array: array[index]
        )
        for part, array in arrays.items()
    }
    weight = joined(tensors, {"quantization_config": CONFIG}, "here")["a.weight"]
    np.testing.assert_array_equal(weight.read(), [list(numbers)])
    assert weight.quantized and weight.quantized[0].read().dtype == jnp.dtype(dtype)


WRONG = {
    "a format": ({}, {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
    "zero points": ({"q_proj.weight_zero_point": torch.ones(16, 1)}, {}, "zero points"),
    "a lone scale": ({"x.weight_scale": torch.ones(1)}, {}, r"x.weight_scale has no .*x.weight"),
    "a scale": ({"q_proj.weight_scale": torch.ones(5, 1)}, {}, r"has a scale \[5, 1\]"),
    "no scale": ({"q_proj.weight_scale": None}, {}, "floats without a scale: .*q_proj.weight"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_supported_is_said(saved: Path, copy: Path, what: str):
    narrow, _ = quantized(saved, copy, "fp8, channels")
    changes, config, message = WRONG[what]
    file = narrow / "model.safetensors"
    tensors = load_file(file)
    for end, tensor in changes.items():
        name = f"model.layers.0.self_attn.{end}"
        tensors.pop(name, None)
        tensors |= {} if tensor is None else {name: tensor}
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    edit_config(narrow, quantization_config=CONFIG | config)
    with pytest.raises(InputError, match=message) as error:
        load_model(narrow)
    assert str(error.value).startswith(f"{narrow / 'config.json'}: ")
