"""Kernels of a GPU between its products, interpreted: NumPy's numbers, for any number of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.played import ABSENT_GPU
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_jax.kernels import few_rows_gpu
from medusa_jax.kernels.add_norm_gpu import add_norm
from medusa_jax.model.kernel_choice import KernelChoice
from medusa_jax.model.layers import rms_norm
from medusa_jax.model.linear import Linear
from medusa_jax.model.weight import Adapter, Weight

# In and out, rows, and their type; few, as each is compiled.
CASES = [
    ((64, 128), 1, jnp.float32),
    ((64, 128), 64, jnp.bfloat16),
    ((192, 64), 16, jnp.float32),
    ((320, 384), 23, jnp.bfloat16),
]


def drawn(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def close(found: jax.Array, expected: np.ndarray) -> None:
    """Within the rounding of the result, and of sums in another order."""
    small = 1e-2 if found.dtype == jnp.bfloat16 else 1e-4
    size = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=small * size)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(case=st.sampled_from(CASES), seed=st.integers(0, 99))
def test_products_of_few_rows(case: tuple[tuple[int, int], int, jnp.dtype], seed: int):
    sizes, rows, dtype = case
    x = drawn(seed, rows, sizes[0]).astype(dtype)
    weight = drawn(seed + 1, *sizes).astype(dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    close(few_rows_gpu.product(x[None], weight, interpret=True)[0], expected)
    parts = few_rows_gpu.parts(x, weight, interpret=True)
    assert parts.dtype == jnp.float32
    assert len(parts) == sizes[0] // few_rows_gpu.INPUTS  # few outputs, so as many as can be
    close(parts.sum(axis=0), expected)
    narrow, scale = jnp.round(8 * weight).astype(jnp.int8), jnp.abs(drawn(seed + 2, sizes[1]))
    parts = few_rows_gpu.parts(x, narrow, scale, interpret=True)
    sums = np.asarray(x, np.float64) @ np.asarray(narrow, np.float64)
    close(parts.sum(axis=0), sums * np.asarray(scale))
    gate, up = np.split(expected, 2, axis=1)
    if sizes[1] == 2 * few_rows_gpu.OUTPUTS[1]:
        close(
            few_rows_gpu.product(x, weight, gated=True, interpret=True),
            gate / (1 + np.exp(-gate)) * up,
        )


def test_so_many_parts_that_a_large_gpu_is_at_work():
    """Of outputs of Llama-2-7B, a program has 128: 32 programs of four parts."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 11008), (11008, 4096))]
    assert jax.eval_shape(few_rows_gpu.parts, *shapes).shape == (4, 64, 4096)


@pytest.mark.parametrize(
    ("rows", "shape", "dtype", "known"),
    [
        (64, (128, 64), jnp.bfloat16, True),
        (65, (128, 64), jnp.bfloat16, False),
        (1, (64, 128), jnp.bfloat16, True),
        (1, (128, 96), jnp.bfloat16, False),
        (1, (96, 128), jnp.bfloat16, False),
        (1, (128, 64), jnp.float32, False),
    ],
)
def test_what_the_kernel_of_few_rows_knows(rows: int, shape: tuple, dtype: jnp.dtype, known: bool):
    x, weight = (jax.ShapeDtypeStruct(size, dtype) for size in ((1, rows, shape[0]), shape))
    assert few_rows_gpu.knows(x, weight) == known
    assert few_rows_gpu.knows(x, weight, gated=True) == (known and shape[1] % 128 == 0)
    mixed = jax.ShapeDtypeStruct((1, rows, shape[0]), jnp.float32)
    assert not few_rows_gpu.knows(mixed, jax.ShapeDtypeStruct(shape, jnp.bfloat16))


@pytest.mark.parametrize("rows", [1, 64])
def test_gpu_kernels_are_lowered_for_a_gpu_that_is_not_here(rows: int):
    """For products, parts of narrow weights, gates, and sums with their norm: four kernels."""
    x, weight = (jax.ShapeDtypeStruct(one, jnp.bfloat16) for one in ((1, rows, 128), (128, 256)))
    narrow = jax.ShapeDtypeStruct((256, 128), jnp.int8)

    def layer(x: jax.Array, weight: jax.Array, narrow: jax.Array) -> tuple[jax.Array, jax.Array]:
        inner = few_rows_gpu.product(x, weight)
        update = few_rows_gpu.parts(inner, narrow, jnp.ones(128))
        total, normed = add_norm(x, update, jnp.ones(128, x.dtype), 1e-5)
        return total, few_rows_gpu.product(normed, weight, gated=True)

    with jax.sharding.use_abstract_mesh(ABSENT_GPU):
        lowered = jax.jit(layer).trace(x, weight, narrow).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 4


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("width", [64, 96])
def test_parts_are_added_and_scaled(parts: int, width: int):
    """As XLA adds and scales them; without parts, an update in the type of the rows."""
    x, scale = drawn(0, 2, 3, width).astype(jnp.bfloat16), drawn(1, width).astype(jnp.bfloat16)
    update = drawn(2, *([parts] if parts else []), 2, 3, width)
    update = update if parts else update.astype(x.dtype)
    total, normed = add_norm(x, update, scale, 1e-5, interpret=True)
    expected = x + (update.sum(axis=0).astype(x.dtype) if parts else update)
    np.testing.assert_array_equal(total, expected)
    close(normed, np.asarray(rms_norm(expected, scale, 1e-5), np.float64))


def test_what_is_no_matrix_with_a_scale_is_multiplied_by_xla(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(KernelChoice, "platform", "gpu")
    monkeypatch.setattr(few_rows_gpu, "TYPES", (jnp.float32,))
    data, adapter = drawn(0, 64, 128), Adapter(drawn(1, 2, 64), drawn(2, 128, 2), 0.5)
    layer = Linear(128, kernels=KernelChoice(("products",)))

    def kernels(weight: Weight, layer: Linear = layer, **params: jax.Array) -> int:
        variables = {"params": {"weight": weight, **params}}
        return str(jax.make_jaxpr(layer.apply)(variables, drawn(3, 1, 64))).count("pallas_call")

    assert kernels(Weight(data, "in_out")) == 1
    assert kernels(Weight(data.T)) == 0
    assert kernels(Weight(data, "in_out", adapter)) == 0
    narrow = data.astype(jnp.int8)
    assert kernels(Weight(narrow, "in_out", scale=jnp.ones(128))) == 1
    assert kernels(Weight(narrow, "in_out", scale=jnp.ones((128, 2)))) == 0
    biased = Linear(128, use_bias=True, kernels=layer.kernels)
    assert kernels(Weight(data, "in_out"), biased, bias=jnp.zeros(128)) == 0
    assert kernels(Weight(data, "in_out"), Linear(128, kernels=KernelChoice(("attention",)))) == 0
