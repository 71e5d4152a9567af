"""The parameters of all layers as a stack, which a loop runs, so that a single layer is compiled.

"layer_0/mlp/up/weight" [F, D] and its like become "layers/mlp/up/weight" [L, F, D]: in training,
and in decoding where the kernels of a CPU read weights.
"""

import re
from collections.abc import Mapping
from typing import Any

STACK = "layers"
_LAYER = re.compile(r"layer_(\d+)/")


def place(path: str) -> tuple[str, int | None]:
    """The stack that holds a parameter of a single layer, and its index there.

    "layer_3/mlp/up/weight" -> ("layers/mlp/up/weight", 3); "lm_head" -> ("lm_head", None).
    """
    match = _LAYER.match(path)
    return (path, None) if match is None else (f"{STACK}/{path[match.end() :]}", int(match[1]))


def members(path: str, layers: int) -> list[str]:
    """The layers' parameters in a stack, in order; for a parameter that is no stack, itself."""
    if not path.startswith(f"{STACK}/"):
        return [path]
    return [f"layer_{i}/{path.removeprefix(f'{STACK}/')}" for i in range(layers)]


def in_loop(params: Mapping[str, Any]) -> bool:
    """Whether these parameters of a backbone hold the layers as a stack."""
    return STACK in params
