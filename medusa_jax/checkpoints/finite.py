"""Whether stored tensors are finite, found out as they are read, which costs no second reading."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from medusa_jax.checkpoints.stored_tensor import StoredTensor, Tensors

_BLOCK = 2**18  # numbers looked at together: they stay in a processor's cache


def finite(array: np.ndarray) -> bool:
    """Whether an array holds neither NaN nor an infinity; integers never do.

    ([1.0, -2.0],) -> True; ([1.0, nan],) -> False.
    """
    exponent = _exponent(array.dtype)
    if exponent is None:
        return True
    bits = array.reshape(-1).view(exponent.dtype)
    blocks = (bits[start : start + _BLOCK] for start in range(0, bits.size, _BLOCK))
    return all((block & exponent).max() != exponent for block in blocks)


@functools.cache
def _exponent(dtype: np.dtype) -> np.ndarray | None:
    """Bits of the exponent of a type of floats, all of them 1 in NaN and infinity alone."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return np.array(np.inf, dtype).view(f"u{dtype.itemsize}")


def watched(tensors: Tensors, ruined: set[str]) -> Tensors:
    """The same tensors; what is read of them goes to `ruined` by name where it is not finite."""

    def watch(name: str, tensor: StoredTensor) -> StoredTensor:
        def read(index: object = ...) -> np.ndarray:
            array = tensor.read(index)
            if not finite(array):
                ruined.add(name)
            return array

        narrow = tensor.quantized
        pair = narrow and (watch(name, narrow[0]), watch(name, narrow[1]))
        return dataclasses.replace(tensor, read=read, quantized=pair)

    return {name: watch(name, tensor) for name, tensor in tensors.items()}
