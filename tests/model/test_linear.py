"""Weights in both orders: the same numbers, stacked or not, with an adapter or without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medusa_jax.model.linear import Linear
from medusa_jax.model.weight import Adapter, Weight, weight_of


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_both_orders_give_the_product():
    x, data = normal(0, 2, 3, 8), normal(1, 5, 8)
    expected = np.asarray(x) @ np.asarray(data).T
    for weight in (weight_of(data), Weight(data.T, "in_out")):
        assert weight_of(weight) is weight
        np.testing.assert_allclose(weight.dot(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_each_vector_of_a_stack_meets_its_own_weight(count: int):
    x, data = normal(0, 2, count, 8), normal(1, count, 5, 8)
    expected = np.stack([x[:, i] @ data[i].T for i in range(count)], axis=1)
    for weight in (Weight(data), Weight(data.mT, "in_out")):
        np.testing.assert_allclose(weight.dot(x), expected, rtol=1e-5, atol=1e-5)


def test_products_of_bfloat16_are_float32():
    x, data = normal(0, 3, 8).astype(jnp.bfloat16), normal(1, 5, 8).astype(jnp.bfloat16)
    wide = Weight(data).dot(x)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, x.astype(jnp.float32) @ data.astype(jnp.float32).T, rtol=1e-5)


@pytest.mark.parametrize("order", ["out_in", "in_out"])
def test_an_adapter_adds_its_low_rank_product(order: str):
    x, data, a, b = normal(0, 3, 8), normal(1, 5, 8), normal(2, 2, 8), normal(3, 5, 2)
    weight = Weight(data if order == "out_in" else data.T, order, Adapter(a, b, scale=0.5))
    whole = data + 0.5 * b @ a
    np.testing.assert_allclose(weight.dot(x), x @ whole.T, rtol=1e-4, atol=1e-4)
    ids = jnp.array([4, 0])
    np.testing.assert_allclose(weight.rows(ids).dot(x), x @ whole[ids].T, rtol=1e-4, atol=1e-4)


def test_dropout_needs_a_key_and_keeps_the_mean():
    x, a, b = jnp.ones((20_000, 4)), jnp.eye(4), jnp.eye(4)
    adapter = Adapter(a, b, scale=1.0, dropout=0.25)
    np.testing.assert_array_equal(adapter.dot(x), x)
    noisy = dataclasses.replace(adapter, key=jax.random.key(0)).dot(x)
    assert set(np.unique(noisy)) == {0.0, np.float32(1 / 0.75)}
    assert noisy.mean() == pytest.approx(1.0, abs=0.02)


def test_one_linear_layer_reads_plain_arrays_weights_and_stacks():
    x, data, bias = normal(0, 3, 2, 8), normal(1, 2, 8, 8), normal(2, 2, 8)
    stack = Linear(8, use_bias=True, stack=(2,))
    plain = stack.apply({"params": {"weight": data, "bias": bias}}, x)
    turned = {"weight": Weight(data.mT, "in_out"), "bias": bias}
    np.testing.assert_allclose(stack.apply({"params": turned}, x), plain, rtol=1e-5, atol=1e-5)
    for i in range(2):
        alone = {"params": {"weight": data[i], "bias": bias[i]}}
        single = Linear(8, use_bias=True).apply(alone, x[:, i])
        np.testing.assert_allclose(single, plain[:, i], rtol=1e-5, atol=1e-5)
    shapes = jax.eval_shape(stack.init, jax.random.key(0), x)["params"]
    assert {name: leaf.shape for name, leaf in shapes.items()} == {
        "weight": (2, 8, 8),
        "bias": (2, 8),
    }


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(), (1, 1), (2, 3), (2, 4)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_rows_fill_a_tile_on_a_tpu(monkeypatch, rows: tuple[int, ...], count: int):
    """Zeros are added and taken away; eight rows have no need of it, and a CPU has none."""
    stack = (count,) if count else ()
    x, data = normal(0, *rows, *stack, 8), normal(1, *stack, 5, 8)
    plain = Weight(data).dot(x)
    assert "stablehlo.pad" not in jax.jit(Weight(data).dot).lower(x).as_text()
    filled: list[int] = []

    def on_a_tpu(*arrays: jax.Array, tpu, default):
        filled.append(str(jax.make_jaxpr(tpu)(*arrays)).count("pad["))
        return tpu(*arrays)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_a_tpu)
    np.testing.assert_allclose(Weight(data).dot(x), plain, rtol=1e-5, atol=1e-6)
    assert filled == ([] if rows == (2, 4) else [1])
