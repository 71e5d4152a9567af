"""The kernel of few rows: NumPy's products, for any shape, type and number of rows."""

import ctypes
import logging
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medusa_jax.kernels import few_rows
from medusa_jax.model.linear import Weight

needs_compiler = pytest.mark.skipif(
    not few_rows.available(), reason="no C++ compiler: XLA's products are used"
)
TYPES = (jnp.float32, jnp.bfloat16, jnp.int8)


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if dtype == jnp.int8:
        return jnp.asarray(rng.integers(-127, 128, shape, np.int8))
    return jnp.asarray(rng.normal(size=shape), dtype)


def expected(x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> np.ndarray:
    """Sums in float64."""
    y = np.einsum("...i,...oi->...o", *(np.asarray(a, np.float64) for a in (x, weight)))
    return y if scale is None else y * np.asarray(scale)


@needs_compiler
@pytest.mark.parametrize("seed", range(40))
def test_products_of_any_shape_and_type(seed: int):
    rng = np.random.default_rng(seed)
    rows, stack = int(rng.integers(1, 40)), int(rng.integers(0, 4))
    # Lengths around the lanes, the groups and the slices of the kernel, and others.
    out = int(rng.choice([1, 7, 24, 25, 100, *rng.integers(1, 300, 3)]))
    inner = int(rng.choice([1, 15, 16, 17, 576, 1025, 6145, *rng.integers(1, 3000, 3)]))
    dtype = TYPES[seed % 3]
    weight = drawn(rng, (*([stack] if stack else []), out, inner), dtype)
    x = drawn(rng, (rows, *weight.shape[:-2], inner), TYPES[seed % 2])
    scale = jnp.asarray(rng.uniform(0.5, 2, weight.shape[:-1]), jnp.float32)
    scale = scale if dtype == jnp.int8 or seed % 5 == 0 else None
    got = jax.jit(few_rows.product)(x, weight, scale)
    want = expected(x, weight, scale)
    bound = 2e-6 * np.sqrt(inner) * np.abs(want).max() + 1e-6
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)
    assert got.dtype == jnp.float32


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.__name__)
def test_a_row_is_the_same_alone_and_among_others(dtype: jnp.dtype):
    rng = np.random.default_rng(0)
    weight, x = drawn(rng, (70, 3000), dtype), drawn(rng, (33, 3000), jnp.float32)
    together = few_rows.product(x, weight)
    for count in (1, 2, 5, 6, 7, 12):
        np.testing.assert_array_equal(few_rows.product(x[:count], weight), together[:count])


@needs_compiler
def test_numbers_that_are_not_finite_stay_in_their_row():
    weight = jnp.ones((30, 20))
    x = jnp.ones((3, 20)).at[1, 19].set(jnp.nan).at[2, 0].set(jnp.inf)
    y = few_rows.product(x, weight)
    assert jnp.all(y[0] == 20) and jnp.isnan(y[1]).all() and jnp.isinf(y[2]).all()


@needs_compiler
@pytest.mark.parametrize("level", few_rows.LEVELS)
def test_instruction_sets_agree(level: str):
    """Each set that this processor has, called as the entry calls it."""
    flags = {"avx2": "avx2", "avx512": "avx512bw"}
    if level in flags and flags[level] not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {level}")

    class Product(ctypes.Structure):
        _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scale", "x", "y")] + [
            (name, ctypes.c_long) for name in ("rows", "in_", "stride", "y_stride", "begin", "end")
        ] + [("type", ctypes.c_int)]  # fmt: skip

    rng = np.random.default_rng(0)
    weight = rng.normal(size=(50, 37)).astype(np.float32)
    x = np.zeros((9, 48), np.float32)
    x[:, :37] = rng.normal(size=(9, 37))
    y = np.zeros((9, 50), np.float32)
    pointers = weight.ctypes.data, None, x.ctypes.data, y.ctypes.data
    product = Product(*pointers, 9, 37, 48, 50, 0, 50, 0)
    compute = getattr(ctypes.CDLL(str(few_rows.library())), f"few_rows_{level}")
    compute(ctypes.byref(product))
    np.testing.assert_allclose(y, x[:, :37] @ weight.T, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 8, few_rows.MOST_ROWS, few_rows.MOST_ROWS + 1])
def test_a_weight_takes_the_kernel_for_few_rows_only(rows: int):
    data, x = jnp.ones((5, 8)), jnp.ones((rows, 8))
    weight = Weight(data, few_rows=True)
    lowered = jax.jit(Weight.dot).lower(weight, x).as_text()
    assert ("medusa_few_rows" in lowered) == (rows <= few_rows.MOST_ROWS)
    np.testing.assert_allclose(weight.dot(x), Weight(data).dot(x))
    np.testing.assert_allclose(weight.rows(jnp.array([3, 1])).dot(x), jnp.full((rows, 2), 8.0))


def test_without_a_compiler_it_says_so_and_is_not_available(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MEDUSA_JAX_CACHE", str(tmp_path))
    for compiler, reason in (("/no/such/compiler", "No such file"), ("false", "few_rows")):
        monkeypatch.setenv("CXX", compiler)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert not few_rows.available.__wrapped__()
        assert len(caplog.records) == 1 and "few rows are XLA's" in caplog.text
        assert reason in caplog.text or compiler in caplog.text
    assert not list(tmp_path.glob("kernels/*"))


@needs_compiler
def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDUSA_JAX_CACHE", str(tmp_path))
    built = few_rows.library()
    assert built.parent == tmp_path / "kernels"
    monkeypatch.setattr(subprocess, "run", None)
    assert few_rows.library() == built
