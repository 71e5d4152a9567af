"""The layout of decoding: the same parameters in another order, and the same logits."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.head_files import one_by_one, stored
from helpers.models import TINY, TinyModel, apart

from medusa_jax.checkpoints.weight_layout import (
    for_decoding,
    joined,
    looped,
    narrowed,
    placed,
    stacked,
)
from medusa_jax.drafting.medusa_heads import Head, HeadsConfig, MedusaHeads, first_heads
from medusa_jax.kernels import NAMES, native
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.model.kernel_choice import KernelChoice
from medusa_jax.model.kv_cache import init_cache
from medusa_jax.model.layer_stack import in_loop
from medusa_jax.model.weight import Weight

TOKENS = jnp.array([[3, 1, 4, 1, 5]])


def logits(config, params, tokens=TOKENS):
    module, size = Backbone(config), tokens.shape[1]
    positions = jnp.arange(size)[None]
    hidden, _ = module.apply({"params": params}, tokens, positions, causal_mask(size))
    return module.apply({"params": params}, hidden, method="unembed")


def test_names_stay_and_weights_are_transposed():
    tensor = np.arange(40.0).reshape(5, 8)
    turned = placed("mlp/up/weight", tensor)["mlp/up/weight"]
    assert turned.order == "in_out"
    np.testing.assert_array_equal(turned.data, tensor.T)
    assert placed("mlp/up/bias", tensor[0]).keys() == {"mlp/up/bias"}
    assert placed("embed/embedding", tensor).keys() == {"embed/embedding"}
    tied = placed("embed/embedding", tensor, tied=True)
    assert tied.keys() == {"embed/embedding", "lm_head"}
    np.testing.assert_array_equal(tied["lm_head"].data, tied["embed/embedding"].T)


@pytest.mark.parametrize(("device", "turned"), [("gpu", "out_in"), ("cpu", "in_out")])
def test_a_gpu_holds_narrow_weights_of_many_outputs_as_they_are(monkeypatch, device, turned):
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    tall, wide = np.ones((8, 5)), np.ones((5, 8))

    def order(tensor: np.ndarray, quantize: str) -> str:
        return placed("mlp/up/weight", tensor, quantize=quantize)["mlp/up/weight"].order

    assert order(tall, "int8") == turned
    assert order(wide, "int8") == order(tall, "none") == "in_out"


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_backbone_gives_the_same_logits(tiny: TinyModel, tied: bool):
    config = dataclasses.replace(TINY, tied=tied)
    params = dict(tiny.params["backbone"])
    if tied:
        del params["lm_head"]
    laid_out = for_decoding({"backbone": params}, tied=tied)["backbone"]
    np.testing.assert_allclose(logits(config, laid_out), logits(config, params), atol=1e-4)
    back = stored(laid_out)
    if tied:
        back.pop("lm_head")
    chex.assert_trees_all_equal(back, jax.tree.map(np.asarray, params))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_heads_give_the_same_logits(shared: bool):
    """Of each head alone, of the stack, and of the stack that decoding holds."""
    heads = HeadsConfig(2, 2, 8, 0 if shared else 12, shared)
    unembed = Weight(jax.random.normal(jax.random.key(1), (12, 8))).dot
    hidden = jax.random.normal(jax.random.key(2), (3, 8))
    params = MedusaHeads(heads).init(jax.random.key(0), hidden, unembed)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    random = [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, random)
    single = apart(params)
    laid_out = for_decoding({"heads": single})["heads"]
    expected = [
        Head(heads).apply({"params": single[f"head_{i}"]}, hidden, unembed) for i in range(2)
    ]
    assert not np.allclose(expected[0], expected[1])
    for layout in (params, laid_out):
        found = MedusaHeads(heads).apply({"params": layout}, hidden, unembed)
        np.testing.assert_allclose(jnp.stack(found), jnp.stack(expected), atol=1e-4)
    first = MedusaHeads(dataclasses.replace(heads, num_heads=1))
    (alone,) = first.apply({"params": first_heads(laid_out, 1)}, hidden, unembed)
    np.testing.assert_allclose(alone, expected[0], atol=1e-4)
    chex.assert_trees_all_equal(stored(laid_out), jax.tree.map(np.asarray, single))


def test_layers_of_one_input_become_a_single_layer():
    leaves = {f"layer_0/mlp/{name}/weight": name for name in ("up", "gate", "down")}
    leaves |= {f"layer_0/attention/{name}/bias": name for name in ("query", "key", "value")}
    assert joined(leaves, "+".join) == {
        "layer_0/mlp/down/weight": "down",
        "layer_0/mlp/gate_up/weight": "gate+up",
        "layer_0/attention/query_key_value/bias": "query+key+value",
    }


def test_blocks_of_heads_are_stacked_in_order():
    leaves = {f"head_{i}/block_1/bias": i for i in (10, 2, 0)} | {"head_2/vocab": 7}
    assert stacked(leaves, sum) == {"head_2/vocab": 7, "block_1/bias": 12}
    weights = {f"head_{i}/block_1/weight": Weight(i, "in_out") for i in (10, 2, 0)}
    assert stacked(weights, tuple)["block_1/weight"] == Weight((0, 2, 10), "in_out")


@pytest.mark.parametrize(
    ("inputs", "quantize", "kernel"),
    [
        (64, "int4", True),
        (192, "int4", True),
        (96, "int4", False),
        (96, "int8", True),
        (64, "fp8", False),
    ],
)
def test_groups_that_fit_take_the_kernel(inputs: int, quantize: str, kernel: bool):
    path, wide = "layer_0/mlp/up/weight", jax.random.normal(jax.random.key(0), (70, inputs))
    x = jax.random.normal(jax.random.key(1), (3, inputs))
    made = [
        narrowed(
            path, placed(path, wide, few_rows=few, quantize=quantize)[path], quantize, "float32"
        )
        for few in (native.available(), False)
    ]
    assert made[0].few_rows == (kernel and native.available()) and not made[1].few_rows
    np.testing.assert_allclose(made[0].dot(x), made[1].dot(x), atol=2e-3)


@pytest.mark.slow
def test_layers_are_stacked_where_a_kernel_reads_them(tiny: TinyModel):
    """A stack of layers means what they mean one by one; layers that differ stay apart."""
    leaves = {"layer_1/mlp_norm/scale": np.ones(2), "layer_0/mlp_norm/scale": np.zeros(2)}
    stack = looped(leaves | {"lm_head": np.ones(3)}, np.stack)
    assert stack.keys() == {"lm_head", "layers/mlp_norm/scale"}
    np.testing.assert_array_equal(stack["layers/mlp_norm/scale"], [[0, 0], [1, 1]])
    other = leaves | {"layer_0/mlp_norm/scale": np.zeros(2, np.int8)}
    assert looped(other, np.stack) is other
    params = {"backbone": tiny.params["backbone"]}
    for quantize in ("none", "int8"):
        how = {"few_rows": native.available(), "quantize": quantize}
        together = for_decoding(params, **how)["backbone"]
        assert in_loop(together) == native.available()
        for tokens in (TOKENS, jnp.tile(TOKENS, (1, 30))):  # products of few rows, and XLA's
            found, expected = (logits(TINY, p, tokens) for p in (together, one_by_one(together)))
            np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="no C++ compiler: layers are no stack")
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("windows", [(), (3, 3), (None, 3), (4, None)])
def test_a_loop_reads_each_layer_of_the_cache(tiny: TinyModel, windows: tuple, kernels: bool):
    """Of two rows of different lengths, and of a single row of the cache; by window."""
    config = dataclasses.replace(TINY, windows=windows)
    stack = for_decoding({"backbone": tiny.params["backbone"]}, few_rows=True)["backbone"]
    module = Backbone(config, KernelChoice(NAMES if kernels else ()))
    empty = init_cache(config, 2, 160, jnp.float32, stacked=True)
    shapes = [(key, one.shape) for key, one in zip((0, 1), (empty.keys, empty.values), strict=True)]
    keys, values = (jax.random.normal(jax.random.key(key), shape) for key, shape in shapes)
    cache = dataclasses.replace(empty, keys=keys, values=values, length=jnp.array([7, 150]))
    layers = range(config.num_layers)
    apart = {
        "keys": tuple(keys[:, i] for i in layers),
        "values": tuple(values[:, i] for i in layers),
    }
    for row in (None, 1):
        rows = slice(None) if row is None else slice(row, row + 1)
        past = dataclasses.replace(
            cache, length=cache.length[rows], row=None if row is None else jnp.int32(row)
        )
        tokens = jnp.tile(TOKENS, (len(past.length), 1))
        inputs = tokens, past.length[:, None] + jnp.arange(5), causal_mask(5)
        got, block = module.apply({"params": stack}, *inputs, past)
        separate = dataclasses.replace(past, **apart)
        want, blocks = module.apply({"params": one_by_one(stack)}, *inputs, separate)
        np.testing.assert_allclose(got, want, atol=1e-5)
        for whole, parts in zip(block.turned(), blocks.turned(), strict=True):
            np.testing.assert_allclose(whole, jnp.stack(parts, axis=1), atol=1e-5)
