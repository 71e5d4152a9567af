"""Quantized weights: near the originals, read block by block, and decoded like any weights."""

import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from helpers.models import TINY, TinyModel

from medusa_jax.checkpoints import quantization
from medusa_jax.checkpoints.load import load_model
from medusa_jax.checkpoints.quantization import TYPES, quantized, stored
from medusa_jax.checkpoints.stored_tensor import StoredTensor
from medusa_jax.checkpoints.weight_layout import for_decoding
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.network import precision
from medusa_jax.decoding.state import outputs
from medusa_jax.drafting.drafter import NoDraft
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.kernels import native
from medusa_jax.model.weight import Weight
from medusa_jax.param_paths import device_bytes, flat

# Half a step of int8 and int4, and of a float with 3 bits after the point, of the largest number.
NEAR = {"int8": 0.5 / 127, "fp8": 1 / 32, "int4": 0.5 / 7}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def tensor(array: np.ndarray, sizes: list[int] | None = None) -> StoredTensor:
    """A tensor in a file, which notes how many numbers are read together."""

    def read(index=...):
        part = array[index]
        if sizes is not None:
            sizes.append(part.size)
        return part

    return StoredTensor(array.shape, str(array.dtype), read)


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    ("shape", "order"), [((40, 64), "out_in"), ((40, 64), "in_out"), ((3, 40, 64), "in_out")]
)
def test_products_are_those_of_qwix_and_near_the_originals(name: str, shape, order: str):
    array = normal(*shape)
    axis = -1 if order == "out_in" else -2
    data, scale = quantized(array if axis == -1 else array.swapaxes(-1, -2), TYPES[name], axis)
    weight = Weight(data, order, scale=scale)
    groups = {array.ndim - 1: 64} if name == "int4" else {}
    others = range(array.ndim - 1)
    theirs = qwix.dequantize(
        qwix.quantize(jnp.asarray(array), TYPES[name], channelwise_axes=others, tiled_axes=groups)
    )
    assert np.abs(theirs - array).max() <= NEAR[name] * np.abs(array).max()
    x = jnp.asarray(normal(7, *shape[:-2], 64))
    exact = Weight(theirs).dot(x)
    np.testing.assert_allclose(weight.dot(x), exact, rtol=1e-4, atol=1e-4)
    if len(shape) == 2:
        ids = jnp.array([4, 0])
        np.testing.assert_allclose(weight.rows(ids).dot(x), exact[:, ids], rtol=1e-4, atol=1e-4)
        if order == "out_in":
            np.testing.assert_allclose(weight.lookup(ids), theirs[ids], rtol=1e-6)
    half = weight.dot(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, exact, atol=0.2)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("axis", [-1, -2])
def test_a_stored_tensor_is_quantized_in_blocks_and_parts(monkeypatch, name: str, axis: int):
    """As the whole is, whatever part of it a device asks for."""
    monkeypatch.setattr(quantization, "_BLOCK", 3 * 2 * 64)
    array, sizes = normal(2, 10, 64), []
    array = array if axis == -1 else array.swapaxes(-1, -2)
    whole = [np.asarray(part) for part in quantized(array, TYPES[name], axis)]
    values, scale = stored(tensor(array, sizes), TYPES[name], axis)
    for ours, theirs in zip((values, scale), whole, strict=True):
        np.testing.assert_array_equal(ours.read(), theirs)
        assert ours.shape == theirs.shape and ours.dtype == str(theirs.dtype)
    assert max(sizes) == 3 * 2 * 64 and sum(sizes) == array.size
    part = (slice(0, 1), slice(2, 7), slice(4, 6))
    np.testing.assert_array_equal(values.read(part), whole[0][part])
    outputs_part = part[1] if axis == -1 else part[2]
    asked = (part[0], outputs_part, slice(None))[: scale.read().ndim]
    np.testing.assert_array_equal(scale.read(asked), whole[1][asked])


@pytest.mark.parametrize(("name", "kernels"), [("int8", True), ("fp8", True), ("int4", False)])
def test_a_model_is_loaded_narrow(saved: Path, name: str, kernels: bool):
    whole, narrow = load_model(saved), load_model(saved, quantize=name, kernels=kernels)
    assert (whole.precision, narrow.precision) == ("float32", name)
    assert narrow.fingerprint == whole.fingerprint
    params = flat(narrow.params["backbone"])
    for path, leaf in params.items():
        expected = quantization.type_for(path, name)
        if isinstance(leaf, Weight):
            assert leaf.data.dtype == expected, path
        else:
            assert leaf.dtype == jnp.float32, path
    assert {path.split("/")[-1] for path, x in params.items() if isinstance(x, Weight)} == {
        "weight", "embedding", "lm_head",
    }  # fmt: skip
    assert precision(narrow.params) == jnp.float32
    half = load_model(saved, dtype="bfloat16", quantize=name)
    assert precision(half.params) == jnp.bfloat16


def test_a_tied_table_is_held_once(tiny: TinyModel):
    backbone = {key: x for key, x in tiny.params["backbone"].items() if key != "lm_head"}
    for few in (True, False):
        how = {"tied": True, "few_rows": few, "quantize": "int8"}
        assert "lm_head" not in for_decoding({"backbone": backbone}, **how)["backbone"]


def test_int4_counts_half_a_byte():
    assert device_bytes({"a": jnp.zeros((4, 6), jnp.int4), "b": jnp.zeros(3)}) == 12 + 12


@pytest.mark.parametrize("name", TYPES)
def test_a_loop_keeps_no_wide_copy_of_its_weights(name: str):
    """XLA:CPU would move conversions out of the loop, and hold all weights in float32."""
    data, scale = quantized(normal(256, 256), TYPES[name], -1)
    weights = [Weight(data + 0, scale=scale) for _ in range(16)]

    def run(weights, x):
        def body(carry):
            i, x = carry
            for weight in weights:
                x = jnp.tanh(weight.dot(x))
            return i + 1, x

        return jax.lax.while_loop(lambda carry: carry[0] < 9, body, (0, x))[1]

    compiled = jax.jit(run).lower(weights, jnp.ones((2, 256))).compile()
    narrow = 16 * data.size * (2 if name == "int4" else 1)  # int4 is unpacked into int8
    assert compiled.memory_analysis().temp_size_in_bytes < narrow + 2e6


@pytest.mark.slow
def test_greedy_text_with_a_tree_equals_plain_text(tiny: TinyModel):
    params = for_decoding(tiny.params, few_rows=native.available(), quantize="int8")
    prompts, texts = [[3, 1, 4], [1, 5, 9, 2, 6]], []
    tree = Tree(((0,), (1,), (0, 0), (0, 1), (0, 0, 0)))
    for drafter in (NoDraft(), drafter_of_heads(tiny.heads, tree)):
        decoder = Decoder(TINY, drafter, capacity=64)
        state = decoder.prefill(params, prompts, max_new_tokens=24)
        texts.append([output.token_ids for output in outputs(decoder.generate(params, state))])
    assert texts[0] == texts[1] and len(texts[0][0]) == 24


def test_scales_are_split_as_outputs_are(saved: Path):
    alone = load_model(saved, kernels=False, quantize="int8")
    split = load_model(saved, mesh="tensor=1", quantize="int8")
    ours, theirs = flat(split.params["backbone"]), flat(alone.params["backbone"])
    for path in ("embed/embedding", "layer_0/attention/out/weight", "layer_1/mlp/down/weight"):
        chex.assert_trees_all_equal(ours[path], theirs[path])
    parts = [ours[f"layer_0/mlp/{name}/weight"].scale for name in ("gate", "up")]
    np.testing.assert_array_equal(np.concatenate(parts), theirs["layer_0/mlp/gate_up/weight"].scale)
    with pytest.raises(InputError, match="int4 cannot be split"):
        load_model(saved, mesh="tensor=1", quantize="int4")


def test_what_cannot_be_quantized_is_said(saved: Path, monkeypatch):
    with pytest.raises(InputError, match="quantize is 'int3'; expected int8, fp8, int4, none"):
        load_model(saved, quantize="int3")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(InputError, match=r"pip install 'medusa_jax\[quantize\]'"):
        load_model(saved, quantize="int8")
    assert load_model(saved).precision == "float32"
