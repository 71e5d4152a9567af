"""How weights lie in memory: [out, in] in files and in training, [in, out] for decoding.

Both give the same numbers. With the 2 to 64 rows of a tree XLA's CPU products
take half the time on [in, out]; `hf.load_model` brings weights in that way, and
the modules use whichever they find: "weight" [F, D] or "kernel" [D, F],
"lm_head" or "lm_head_kernel", "vocab" or "vocab_kernel". For decoding the blocks
of all heads are stacked too, "block_0/kernel" [M, D, D]: one product for M.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from medusa_jax.param_paths import flat, nested
from medusa_jax.shapes import typed

_T = TypeVar("_T")
_KERNELS = {"weight": "kernel", "lm_head": "lm_head_kernel", "vocab": "vocab_kernel"}


@typed
def project(x: Float[Array, "*dims D"], weight: Float[Array, "F D"]) -> Float[Array, "*dims F"]:
    """x W^T, accumulated and returned in float32."""
    return jnp.einsum("...d,fd->...f", x, weight, preferred_element_type=jnp.float32)


@typed
def multiply(x: Float[Array, "*dims D"], kernel: Float[Array, "D F"]) -> Float[Array, "*dims F"]:
    """x K, accumulated and returned in float32."""
    return jnp.einsum("...d,df->...f", x, kernel, preferred_element_type=jnp.float32)


@typed
def multiply_each(
    x: Float[Array, "*dims M D"], kernels: Float[Array, "M D F"]
) -> Float[Array, "*dims M F"]:
    """Each of M vectors times the kernel of its own, accumulated and returned in float32."""
    if kernels.shape[0] == 1:  # as a batch of one XLA would transpose the kernel on a CPU
        return multiply(x, kernels[0])
    return jnp.einsum("...md,mdf->...mf", x, kernels, preferred_element_type=jnp.float32)


def placed(path: str, array: Any, *, tied: bool = False) -> dict[str, Any]:
    """A parameter as decoding wants it, by path; norms, biases and embeddings stay as they are.

    "mlp/up/weight" [F, D] becomes "mlp/up/kernel" [D, F]. A tied embedding stays for its
    lookup of rows, and is there a second time as "lm_head_kernel".
    """
    *inner, name = path.split("/")
    if name in _KERNELS:
        return {"/".join([*inner, _KERNELS[name]]): array.T}
    if tied and path == "embed/embedding":
        return {path: array, "lm_head_kernel": array.T}
    return {path: array}


def stacked(leaves: dict[str, _T], stack: Callable[[list[_T]], _T]) -> dict[str, _T]:
    """All leaves by path, those of heads' blocks stacked over the heads.

    "head_0/block_1/bias" [D] to "head_3/block_1/bias" become "block_1/bias" [4, D].
    """
    found: dict[str, dict[int, _T]] = {}
    rest = {}
    for path, leaf in leaves.items():
        if match := re.fullmatch(r"head_(\d+)/(block_\d+/\w+)", path):
            found.setdefault(match[2], {})[int(match[1])] = leaf
        else:
            rest[path] = leaf
    return rest | {
        path: stack([heads[number] for number in sorted(heads)]) for path, heads in found.items()
    }


def for_decoding(params: dict[str, Any], *, tied: bool = False) -> dict[str, Any]:
    """Nested {"backbone", "heads"} parameters [out, in] as decoding wants them."""
    laid = {}
    for part, inner in params.items():
        leaves = {
            where: one
            for path, leaf in flat(inner).items()
            for where, one in placed(path, leaf, tied=tied and part == "backbone").items()
        }
        laid[part] = nested(stacked(leaves, jnp.stack))
    return laid
