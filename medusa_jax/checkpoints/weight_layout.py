"""From the layout of files to the layout of decoding: `Weight` leaves, heads' blocks stacked.

Names stay: "mlp/down/weight" is a tensor [out, in] here and a `Weight` there, which is [out, in]
for the kernel of few rows (`kernels.few_rows`) and [in, out] for XLA's products. Three things
change theirs. A single product is faster than several, so the blocks of the heads,
"head_0/block_0/weight" and its like, become one stack, "block_0/weight" [M, ., .], and layers of
one input, such as "mlp/gate" and "mlp/up", become "mlp/gate_up". The kernel reads a stack where
it lies, so the backbone's "layer_0/..." and on become "layers/..." [L, ...], which a loop runs.

Leaves may be arrays, shapes under `jax.eval_shape`, or tensors that are still in files.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from medusa_jax.checkpoints.quantization import NONE, groups_of, quantized, stored, type_for
from medusa_jax.checkpoints.stored_tensor import StoredTensor
from medusa_jax.kernels import native
from medusa_jax.kernels.few_rows import knows
from medusa_jax.model.layer_stack import place
from medusa_jax.model.linear import joint_name
from medusa_jax.model.weight import Weight, leaves_out_zeros
from medusa_jax.param_paths import flat, nested

_EMBEDDING = "embed/embedding"
# Layers of one input; the last are those of a Hydra head.
_JOINT = (("query", "key", "value"), ("gate", "up"), ("residual", "linear_0"))


def usable(mesh: Any) -> bool:
    """Whether weights can be laid out for `kernels.few_rows`, which knows nothing of a mesh."""
    return mesh is None and native.available()


def products(params: dict[str, Any]) -> str:
    """How these parameters are multiplied: by the kernel's instruction set, "vnni", or "xla"."""
    return native.level() if leaves_out_zeros(params["backbone"]) else "xla"


def placed(
    path: str,
    tensor: Any,
    *,
    tied: bool = False,
    few_rows: bool = False,
    quantize: str = NONE,
) -> dict[str, Any]:
    """One parameter [out, in] as decoding holds it, by path; norms and biases stay as they are.

    "mlp/up/weight" [F, D] becomes the same path's `Weight` [D, F], or [F, D] for `few_rows`. A
    tied embedding stays for its lookup of rows. XLA's products want a transposed copy of it for
    the logits, "lm_head"; a table that will be quantized (`narrowed`) has none.
    """
    table, product = path == _EMBEDDING, path.split("/")[-1] in ("weight", "lm_head", "vocab")
    in_file = tensor.quantized if isinstance(tensor, StoredTensor) else None
    narrow = in_file[0].dtype if in_file else type_for(path, quantize)
    few_rows &= not narrow or knows(narrow, tensor.shape[-1], _groups(tensor, narrow))
    if few_rows and (product or (tied and table)):
        return {path: Weight(tensor, few_rows=True)}
    if (table and narrow) or (product and _by_outputs(tensor, narrow)):
        return {path: Weight(tensor)}
    if product:
        return {path: Weight(tensor.mT, "in_out")}
    if tied and table:
        return {path: tensor, "lm_head": Weight(tensor.mT, "in_out")}
    return {path: tensor}


def _groups(tensor: Any, narrow: str) -> int:
    """Scales that each output has, in its file or once it is quantized."""
    if isinstance(tensor, StoredTensor) and tensor.quantized:
        scales = tensor.quantized[1].shape
        return scales[-1] if len(scales) == len(tensor.shape) else 1
    return groups_of(tensor.shape[-1]) if narrow == "int4" else 1


def _by_outputs(tensor: Any, narrow: str) -> bool:
    """Whether products read this weight faster in the order [out, in], here and without a kernel.

    A GPU's compiler does, of narrow numbers of more outputs than inputs: a product of a single row
    takes two thirds of the time on an H100. It does not of other narrow weights.
    """
    outputs, inputs = tensor.shape[-2:]
    return bool(narrow) and outputs > inputs and jax.default_backend() == "gpu"


def joined(leaves: dict[str, Any], concatenate: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """All leaves [out, ...] by path, with layers of one input as a single layer.

    "mlp/gate/weight" [F, D] and "mlp/up/weight" become "mlp/gate_up/weight" [2 F, D]. A device
    of a mesh holds outputs of each layer, so there they stay apart.
    """
    rest = dict(leaves)
    for names in _JOINT:
        first = f"/{names[0]}/"
        for path in leaves:
            if first in path:
                paths = [path.replace(first, f"/{name}/") for name in names]
                if len({_form(rest[one]) for one in paths}) > 1:
                    continue  # files may quantize some of them only
                parts = [rest.pop(one) for one in paths]
                rest[path.replace(first, f"/{joint_name(names)}/")] = concatenate(parts)
    return rest


def _form(tensor: Any) -> tuple[Any, ...]:
    """How a tensor is quantized in its file: the type of its numbers, scales of each output."""
    pair = tensor.quantized if isinstance(tensor, StoredTensor) else None
    return (pair[0].dtype, pair[1].shape[1:]) if pair else ()


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


def looped(leaves: dict[str, Any], stack: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """All leaves of a backbone by path, as they are held, with those of all layers stacked.

    "layer_0/mlp_norm/scale" [D] and "layer_1/mlp_norm/scale" become "layers/mlp_norm/scale" [2, D].
    Layers that differ, as files may quantize some of them only, stay apart.
    """
    layers: dict[int, dict[str, Any]] = {}
    rest = {}
    for path, leaf in leaves.items():
        name, layer = place(path)
        of = rest if layer is None else layers.setdefault(layer, {})
        of[name] = leaf
    in_order = [layers[number] for number in sorted(layers)]
    forms = [jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), one) for one in in_order]
    if not forms or any(form != forms[0] for form in forms):
        return leaves
    return rest | jax.tree.map(lambda *single: stack(list(single)), *in_order)


def narrowed(path: str, leaf: Any, quantize: str, dtype: str, kernel_dtype: str = "") -> Any:
    """A leaf of `placed` or `stacked` as it is held: quantized, or in `dtype`.

    A weight that is quantized in its file stays as it is there.

    Args:
      kernel_dtype: of weights for `kernels.few_rows`, which widens them; default `dtype`.
    """
    is_weight, tensor = isinstance(leaf, Weight), leaf.data if isinstance(leaf, Weight) else leaf
    in_file = isinstance(tensor, StoredTensor)
    if is_weight and in_file and tensor.quantized:
        data, scale = tensor.quantized
    elif is_weight and (narrow := type_for(path, quantize)):
        axis = -1 if leaf.order == "out_in" else -2
        data, scale = (stored if in_file else quantized)(tensor, narrow, axis)
    else:
        if is_weight and leaf.few_rows:
            dtype = kernel_dtype or dtype
        dtype = "int32" if path == "token_map" else dtype
        wide = tensor.cast(dtype) if in_file else tensor.astype(dtype)
        return dataclasses.replace(leaf, data=wide) if is_weight else wide
    return dataclasses.replace(leaf, data=data, scale=scale, lookup_dtype=dtype)


def for_decoding(
    params: dict[str, Any],
    *,
    tied: bool = False,
    few_rows: bool = False,
    joint: bool = True,
    quantize: str = NONE,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Nested {"backbone", "heads"} parameters [out, in] as decoding holds them."""
    laid_out = {}
    for part, inner in params.items():
        leaves: dict[str, Any] = {}
        whole = joined(flat(inner), jnp.concatenate) if joint else flat(inner)
        for path, leaf in whole.items():
            how = {"tied": tied and part == "backbone", "few_rows": few_rows, "quantize": quantize}
            leaves |= placed(path, leaf, **how)
        leaves = stacked(leaves, jnp.stack)
        leaves = {path: narrowed(path, leaf, quantize, dtype) for path, leaf in leaves.items()}
        if few_rows:
            leaves = looped(leaves, jnp.stack)
        laid_out[part] = nested(leaves)
    return laid_out
