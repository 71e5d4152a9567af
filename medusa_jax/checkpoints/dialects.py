"""The dialects of Medusa heads: how each names its tensors, and what it can hold.

A dialect is a naming of head tensors, a file, and keys in `config.json`. `heads.py` recognizes
and reads them, `conversion.py` writes them, and `names.head_places` serves both.
"""

import dataclasses
from typing import Any

from medusa_jax.checkpoints.names import ORIGINAL, HeadNames
from medusa_jax.drafting.medusa_heads import HeadsConfig

MERGED = HeadNames(
    "medusa_head.{h}.{l}.linear", "medusa_head.{h}.{L}.weight", token_map="medusa_head.token_map"
)
MODELOPT = HeadNames("medusa_heads.{h}.{l}.linear", "medusa_heads.{h}.{L}.weight")
VLLM = HeadNames("blocks.{h}.layers.{l}", "lm_heads.{h}.weight", "lm_head.weight", "token_map")
TRTLLM = HeadNames("medusa_heads.{h}.medusa_layers.{l}.linear", "medusa_heads.{h}.lm_head.weight")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """One layout of heads.

    Attributes:
      names: of its tensors.
      stem: of its file or shards.
      merged: the same directory holds the backbone.
      own, shared: whether its readers know heads with their own projections, and
        heads that share the backbone's.
      truncated: whether they know projections to the tokens of a map.
      writable: whether `convert` writes it; off for formats without living readers.
    """

    names: HeadNames
    stem: str
    merged: bool = False
    own: bool = True
    shared: bool = False
    truncated: bool = False
    writable: bool = True


DIALECTS = {
    "v0.1": Dialect(ORIGINAL, "medusa_lm_head"),
    "v2": Dialect(ORIGINAL, "medusa_lm_head", own=False, shared=True),
    "v1.0": Dialect(MERGED, "model", merged=True, shared=True),
    "tgi": Dialect(ORIGINAL, "medusa_lm_head", shared=True),
    "vllm": Dialect(VLLM, "model", shared=True, truncated=True),
    "mlc": Dialect(MERGED, "model"),
    "modelopt": Dialect(MODELOPT, "model", merged=True),
    "trtllm": Dialect(TRTLLM, "rank", merged=True, writable=False),
}


def head_settings(dialect: str, heads: HeadsConfig) -> dict[str, Any]:
    """What `config.json` says of heads; for merged dialects, beside the backbone's keys."""
    counted = {"medusa_num_heads": heads.num_heads, "medusa_num_layers": heads.num_layers}
    shape = {"hidden_size": heads.hidden_size, "vocab_size": heads.vocab_size}
    if dialect == "vllm":
        return {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            **shape,
            "num_heads": heads.num_heads,
            "num_hidden_layers": heads.num_layers,
            "max_paths": 64,
            "topk": 10,
            "truncated_vocab_size": heads.truncated or heads.vocab_size,
            "original_lm_head": heads.shared,
            "medusa_fc_bias": True,
            "logit_scale": 1.0,
        }
    if dialect == "mlc":
        return {"model_type": "medusa", **counted, **shape}
    if dialect == "modelopt":
        numbers = {"num_medusa_heads": heads.num_heads, "num_medusa_layers": heads.num_layers}
        return {"medusa": numbers}
    # TGI tells shared heads from others by their tensors alone.
    return counted | ({"version": "2"} if heads.shared and dialect != "tgi" else {})
