"""The kernel of few rows: NumPy's products, for any shape, type and number of rows."""

import ctypes
import logging
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.processor import skip_without
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_jax.kernels import few_rows, native
from medusa_jax.model.weight import Weight

needs_compiler = pytest.mark.skipif(
    not native.available(), reason="no C++ compiler: XLA's products are used"
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


def rounded(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Rows as integers below 2^15 and their factors, powers of two; (3, -0.3) -> (24576, -2458)."""
    exponent = np.frexp(np.abs(np.asarray(x, np.float64)).max(-1, keepdims=True))[1]
    factor = 2.0 ** (exponent - 15)
    return np.minimum(np.round(np.asarray(x, np.float64) / factor), 32767), factor


# Lengths around the lanes, the groups and the slices of the kernel, and others.
OUT = st.sampled_from([1, 7, 24, 25, 100, 577]) | st.integers(1, 300)
IN = st.sampled_from([1, 15, 16, 17, 576, 1537, 6145]) | st.integers(1, 3000)


@needs_compiler
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 40), stack=st.integers(0, 3), out=OUT, inner=IN,
    dtype=st.sampled_from(TYPES), x_dtype=st.sampled_from(TYPES[:2]), seed=st.integers(0, 99),
)  # fmt: skip
@pytest.mark.slow
def test_products_of_any_shape_and_type(rows, stack, out, inner, dtype, x_dtype, seed):
    rng = np.random.default_rng(seed)
    weight = drawn(rng, (*([stack] if stack else []), out, inner), dtype)
    x = drawn(rng, (rows, *weight.shape[:-2], inner), x_dtype)
    scale = jnp.asarray(rng.uniform(0.5, 2, weight.shape[:-1]), jnp.float32)
    scale = scale if dtype == jnp.int8 or seed % 5 == 0 else None
    got = few_rows.product(x, weight, scale)
    want = expected(x, weight, scale)
    bound = 2e-6 * np.sqrt(inner) * np.abs(want).max() + 1e-6
    if dtype == jnp.int8:
        integers, factor = rounded(x)
        np.testing.assert_allclose(got, expected(integers * factor, weight, scale), rtol=3e-7)
        largest = np.abs(np.asarray(x, np.float32)).max(-1, keepdims=True)
        bound = 2**-15 * largest * np.abs(np.asarray(weight, np.float32)).sum(-1) * scale + 1e-6
    assert np.all(np.abs(got - want) <= bound)
    assert got.dtype == jnp.float32


def grouped(
    rng: np.random.Generator, shape: tuple[int, ...], groups: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """A weight, a scale of each of its groups, and their product in float64."""
    least, most = (-8, 7) if dtype == jnp.int4 else (-127, 127)
    numbers = rng.integers(least, most + 1, shape)
    scale = rng.uniform(0.5, 2, (*shape[:-1], groups)).astype(np.float32)
    wide = numbers.reshape(*scale.shape, -1) * scale[..., None].astype(np.float64)
    return jnp.asarray(numbers, dtype), jnp.asarray(scale), wide.reshape(shape)


@needs_compiler
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 20), stack=st.integers(0, 3), out=st.integers(1, 80),
    groups=st.integers(1, 30), size=st.sampled_from([32, 64, 96, 128, 1536]),
    narrow=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@pytest.mark.slow
def test_scales_of_groups(rows, stack, out, groups, size, narrow, seed):
    dtype = jnp.int4 if narrow and size % 64 == 0 else jnp.int8
    inner, groups = groups * size, max(groups, 1 if dtype == jnp.int4 else 2)
    inner = groups * size
    assert few_rows.knows(dtype.dtype.name, inner, groups)
    rng = np.random.default_rng(seed)
    shape = (*([stack] if stack else []), out, inner)
    weight, scale, wide = grouped(rng, shape, groups, dtype)
    x = drawn(rng, (rows, *shape[:-2], inner), jnp.float32)
    integers, factor = rounded(x)
    want = expected(integers * factor, wide, None)
    bound = 1e-6 * np.sqrt(inner) * np.abs(want).max()
    np.testing.assert_allclose(few_rows.product(x, weight, scale), want, atol=bound)
    if stack:  # as layers, of which a single one is meant
        alone = few_rows.product(x[:, -1], weight, scale, jnp.int32(stack - 1))
        np.testing.assert_array_equal(alone, few_rows.product(x, weight, scale)[:, -1])


@needs_compiler
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4], ids=["int8", "int4"])
def test_a_row_beside_groups_is_the_same_alone_and_among_others(dtype: jnp.dtype):
    rng = np.random.default_rng(0)
    weight, scale, _ = grouped(rng, (70, 1920), 15, dtype)
    x = drawn(rng, (20, 1920), jnp.float32).at[3].set(0).at[5, 7].set(jnp.nan)
    together = few_rows.product(x, weight, scale)
    for count in (1, 2, 4, 5, 6, 7, 12):
        np.testing.assert_array_equal(few_rows.product(x[:count], weight, scale), together[:count])
    assert not together[3].any() and jnp.isnan(together[5]).all()
    assert jnp.isfinite(together[6:]).all()


@needs_compiler
def test_groups_that_do_not_fit_are_refused():
    for dtype, inner, groups in ((jnp.int4, 96, 1), (jnp.int8, 48, 3), (jnp.int4, 64, 0)):
        assert not groups or not few_rows.knows(dtype.dtype.name, inner, groups)
        weight, scale = jnp.ones((5, inner), dtype), jnp.ones((5, groups)) if groups else None
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit the kernel"):
            few_rows.product(jnp.ones((1, inner)), weight, scale).block_until_ready()
    assert not few_rows.knows("float8_e4m3fn", 64)
    assert not few_rows.knows("int8", 2 * 3072, 2)  # beyond an int32's sums


@needs_compiler
def test_sums_of_the_largest_integers_are_exact():
    x, weight = jnp.full((9, 20_000), 1 - 2**-15), jnp.full((30, 20_000), -128, jnp.int8)
    want = np.float32((1 - 2**-15) * -128 * 20_000)
    np.testing.assert_array_equal(few_rows.product(x, weight), want)


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.__name__)
def test_a_row_is_the_same_alone_and_among_others(dtype: jnp.dtype):
    rng = np.random.default_rng(0)
    weight, x = drawn(rng, (70, 3000), dtype), drawn(rng, (33, 3000), jnp.float32)
    together = few_rows.product(x, weight)
    for count in (1, 2, 5, 6, 7, 12):
        np.testing.assert_array_equal(few_rows.product(x[:count], weight), together[:count])


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.__name__)
def test_numbers_that_are_not_finite_stay_in_their_row(dtype: jnp.dtype):
    weight = jnp.ones((30, 20), dtype)
    x = jnp.ones((3, 20)).at[1, 19].set(jnp.nan).at[2, 0].set(jnp.inf)
    y = few_rows.product(x, weight)
    assert jnp.all(y[0] == 20) and not jnp.isfinite(y[1:]).any()


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("zeros", [[3, 4], [0, 2], [0, 1, 2, 3, 4]])
def test_rows_of_zeros_are_zeros_and_change_no_other_row(dtype: jnp.dtype, zeros: list[int]):
    rng = np.random.default_rng(0)
    weight, x = drawn(rng, (2, 70, 30), dtype), drawn(rng, (5, 2, 30), jnp.float32)
    for narrow in (x.dtype, jnp.bfloat16):
        some = x.at[np.array(zeros)].set(0).astype(narrow)
        want = few_rows.product(x.astype(narrow), weight).at[np.array(zeros)].set(0)
        np.testing.assert_array_equal(few_rows.product(some, weight), want)


class Product(ctypes.Structure):
    """`Product` of few_rows.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("weight", "scale", "x", "x_scale", "y", "places")]
        + [(name, ctypes.c_long) for name in ("rows", "in_", "groups", "x_stride", "y_stride")]
        + [(name, ctypes.c_long) for name in ("begin", "end")]
        + [("type", ctypes.c_int)]
    )


def by_level(
    level: str, x: np.ndarray, weight: np.ndarray, scale: np.ndarray | None = None
) -> np.ndarray:
    """The product by an instruction set, called as the entry calls it.

    Args:
      scale: of groups; the numbers of the weight are then those of int4.
    """
    skip_without(level)
    library = ctypes.CDLL(str(native.library()))
    (rows, inner), out = x.shape, len(weight)
    y, factors, used = np.zeros((rows, out), np.float32), np.ones(rows, np.float32), x
    kind, groups, pointer = (2 if weight.dtype == np.int8 else 0), 0, None
    if weight.dtype == np.int8:
        used, rounding = np.zeros(x.shape, np.int16), getattr(library, f"round_row_{level}")
        rounding.restype = ctypes.c_float
        for row in range(rows):
            places = (ctypes.c_void_p(array[row].ctypes.data) for array in (x, used))
            factors[row] = rounding(next(places), ctypes.c_long(inner), next(places))
    if scale is not None:
        kind, groups, pointer = 3, scale.shape[1], scale.ctypes.data
        used = np.concatenate((used[:, ::2], used[:, 1::2]), axis=1)
        low, high = (weight[:, half::2].astype(np.uint8) & 15 for half in (0, 1))
        weight = low | high << 4
    places = np.arange(rows)
    pointers = (array.ctypes.data for array in (used, factors, y, places))
    numbers = rows, inner, groups, inner, out, 0, out, kind
    product = Product(weight.ctypes.data, pointer, *pointers, *numbers)
    getattr(library, f"few_rows_{level}")(ctypes.byref(product))
    return y


@needs_compiler
@pytest.mark.parametrize("level", native.LEVELS)
def test_instruction_sets_agree(level: str):
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=(size, 1637)).astype(np.float32) for size in (9, 50))
    np.testing.assert_allclose(by_level(level, x, weight), x @ weight.T, rtol=1e-4, atol=1e-4)
    integers = rng.integers(-127, 128, weight.shape).astype(np.int8)
    # The very numbers: products of integers.
    want = few_rows.product(jnp.asarray(x), jnp.asarray(integers))
    np.testing.assert_array_equal(by_level(level, x, integers), want)
    numbers, scale, _ = grouped(rng, (50, 1920), 30, jnp.int4)
    x = rng.normal(size=(9, 1920)).astype(np.float32)
    got = by_level(level, x, np.asarray(numbers).astype(np.int8), np.asarray(scale))
    np.testing.assert_allclose(
        got, few_rows.product(jnp.asarray(x), numbers, scale), rtol=1e-4, atol=1e-3
    )


@needs_compiler
def test_it_says_which_instructions_it_uses():
    assert native.level() in native.LEVELS


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
            assert native.level.__wrapped__() == ""
        assert len(caplog.records) == 1 and "few rows and attention are XLA's" in caplog.text
        assert reason in caplog.text or compiler in caplog.text
    assert not list(tmp_path.glob("kernels/*"))


@pytest.mark.slow
@needs_compiler
def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDUSA_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", ("-O0", "-std=c++17", "-fPIC", "-w"))  # in less time
    built = native.library()
    assert built.parent == tmp_path / "kernels"
    monkeypatch.setattr(subprocess, "run", None)
    assert native.library() == built
