"""From the layout of files to the layout of decoding: `Weight` leaves, heads' blocks stacked.

Names stay: "mlp/up/weight" is a tensor [out, in] here and a `Weight` there, which is [out, in]
for the kernel of few rows (`kernels.few_rows`) and [in, out] for XLA's products. Only the blocks
of the heads change theirs: "head_0/block_0/weight" and its like become one stack,
"block_0/weight" [M, ., .], since one product for M heads is faster than M products.

Leaves may be arrays, shapes under `jax.eval_shape`, or tensors that are still in files.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from medusa_jax.kernels import few_rows as kernel
from medusa_jax.model.linear import Weight
from medusa_jax.param_paths import flat, nested

_WEIGHTS = ("weight", "lm_head", "vocab")


def usable(mesh: Any) -> bool:
    """Whether weights can be laid out for `kernels.few_rows`, which knows nothing of a mesh."""
    return mesh is None and kernel.available()


def products(params: dict[str, Any]) -> str:
    """How these parameters are multiplied: by the kernel's instruction set, "vnni", or "xla"."""
    leaves = flat(params["backbone"]).values()
    kernels = any(isinstance(leaf, Weight) and leaf.few_rows for leaf in leaves)
    return kernel.level() if kernels else "xla"


def placed(path: str, tensor: Any, *, tied: bool = False, few_rows: bool = False) -> dict[str, Any]:
    """One parameter [out, in] as decoding holds it, by path; norms and biases stay as they are.

    "mlp/up/weight" [F, D] becomes the same path's `Weight` [D, F], or [F, D] for `few_rows`. A
    tied embedding stays for its lookup of rows. XLA's products want a transposed copy of it for
    the logits, "lm_head".
    """
    product = path.split("/")[-1] in _WEIGHTS
    if few_rows and (product or (tied and path == "embed/embedding")):
        return {path: Weight(tensor, few_rows=True)}
    if product:
        return {path: Weight(tensor.mT, "in_out")}
    if tied and path == "embed/embedding":
        return {path: tensor, "lm_head": Weight(tensor.mT, "in_out")}
    return {path: tensor}


def stacked(leaves: dict[str, Any], stack: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """All leaves by path, with the heads' blocks stacked over the heads.

    "head_0/block_1/bias" [D] to "head_3/block_1/bias" become "block_1/bias" [4, D].
    """
    blocks: dict[str, dict[int, Any]] = {}
    rest = {}
    for path, leaf in leaves.items():
        if match := re.fullmatch(r"head_(\d+)/(block_\d+/\w+)", path):
            blocks.setdefault(match[2], {})[int(match[1])] = leaf
        else:
            rest[path] = leaf
    for path, heads in blocks.items():
        in_order = [heads[number] for number in sorted(heads)]
        rest[path] = jax.tree.map(lambda *single: stack(list(single)), *in_order)
    return rest


def for_decoding(
    params: dict[str, Any], *, tied: bool = False, few_rows: bool = False
) -> dict[str, Any]:
    """Nested {"backbone", "heads"} parameters [out, in] as decoding holds them."""
    laid_out = {}
    for part, inner in params.items():
        leaves: dict[str, Any] = {}
        for path, leaf in flat(inner).items():
            leaves |= placed(path, leaf, tied=tied and part == "backbone", few_rows=few_rows)
        laid_out[part] = nested(stacked(leaves, jnp.stack))
    return laid_out
