"""The dialects of heads: how each names its tensors, and what it can hold.

A dialect is a naming of head tensors, a file, and keys in `config.json`. `heads.py` recognizes
and reads them, `conversion.py` writes them, and `names.head_places` serves both.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa_jax.checkpoints.names import ORIGINAL, ORIGINAL_HYDRA, HeadNames
from medusa_jax.drafting.medusa_heads import HYDRA, MEDUSA, HeadsConfig

MERGED = HeadNames(
    "medusa_head.{h}.{l}.linear",
    "medusa_head.{h}.{L}.weight",
    token_map="medusa_head.token_map",
    selector="medusa_head.selector",
)
MODELOPT = HeadNames("medusa_heads.{h}.{l}.linear", "medusa_heads.{h}.{L}.weight")
VLLM = HeadNames("blocks.{h}.layers.{l}", "lm_heads.{h}.weight", "lm_head.weight", "token_map")
TRTLLM = HeadNames("medusa_heads.{h}.medusa_layers.{l}.linear", "medusa_heads.{h}.lm_head.weight")
# As they stand in the original's whole model, which it never stores.
HYDRA_MERGED = HeadNames(
    "hydra_head.hydra_mlp.{h}.{l}.linear",
    "hydra_head.hydra_lm_head.{h}.weight",
    token_map="hydra_head.token_map",
    residual="hydra_head.hydra_mlp.{h}.0.res_connection",
)


# In a model's directory, what is read by medusa_jax alone: heads, and their table of bigrams.
# Other programs load each `.safetensors` of a directory, but look into no folder of it.
FOLDER = "medusa"
# What configs of merged models say of heads.
HEAD_KEYS = ("medusa_num_heads", "medusa_num_layers", "version", "medusa")
HEAD_KEYS += ("hydra_num_heads", "hydra_num_layers", "hydra_head_arch", "grounded_heads")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """A layout of heads.

    Attributes:
      names: of its tensors.
      stem: of its file or shards.
      merged: the same directory holds the backbone.
      own, shared: whether its readers know heads with their own projections, and
        heads that share the backbone's.
      repeated: its reader builds the blocks of a head as a single module, repeated.
      writable: whether `convert` writes it; off for formats without living readers.
      architecture: of the heads that it holds.
    """

    names: HeadNames
    stem: str
    merged: bool = False
    own: bool = True
    shared: bool = False
    repeated: bool = False
    writable: bool = True
    architecture: str = MEDUSA

    @property
    def single(self) -> bool:
        """Whether heads are a file of their own, however large: no reader knows of shards."""
        return self.stem.endswith("_lm_head")


DIALECTS = {
    "v0.1": Dialect(ORIGINAL, "medusa_lm_head", repeated=True),
    "v2": Dialect(ORIGINAL, "medusa_lm_head", own=False, shared=True, repeated=True),
    "v1.0": Dialect(MERGED, "model", merged=True, repeated=True),
    "tgi": Dialect(ORIGINAL, "medusa_lm_head", shared=True),
    "vllm": Dialect(VLLM, "model", shared=True),
    "mlc": Dialect(MERGED, "model"),
    "modelopt": Dialect(MODELOPT, "model", merged=True),
    "trtllm": Dialect(TRTLLM, "rank", merged=True, writable=False),
    "hydra": Dialect(ORIGINAL_HYDRA, "hydra_lm_head", repeated=True, architecture=HYDRA),
    "hydra_merged": Dialect(HYDRA_MERGED, "model", merged=True, repeated=True, architecture=HYDRA),
}


def dialect_of(heads: HeadsConfig, *, merged: bool = False) -> str:
    """The dialect that training writes: the original's, alone or merged with a backbone."""
    if heads.architecture == HYDRA:
        return "hydra_merged" if merged else "hydra"
    if merged:
        return "v1.0"
    return "v2" if heads.shared else "v0.1"


def folder(directory: Path) -> Path:
    """The `FOLDER` of a directory of a model or of heads; of one with that name, itself."""
    return directory if directory.name == FOLDER else directory / FOLDER


def shares(dialect: str, heads: HeadsConfig) -> bool:
    """Whether a dialect's readers know that such heads share a projection."""
    known = DIALECTS[dialect].shared
    return known and not (dialect == "tgi" and heads.num_layers > 1)  # TGI then knows one block


def first_repeated(heads: HeadsConfig) -> int:
    """Number of the first block that the originals repeat; a Hydra head's first has no equal."""
    return int(heads.architecture == HYDRA)


def misread(dialect: str, heads: HeadsConfig) -> str:
    """What a dialect's readers would get wrong of such heads; empty: nothing.

    Args:
      heads: their shape; blocks that are all equal count as a single layer.
    """
    reasons = []
    if DIALECTS[dialect].repeated and heads.num_layers > 1 + first_repeated(heads):
        reasons.append(
            "the original builds a head of a single block, repeated, and these heads have "
            f"{heads.num_layers} different blocks"
        )
    if heads.shared and not shares(dialect, heads):
        reasons.append("its readers know no shared projection, and take random numbers for it")
    if heads.truncated:
        reasons.append("no other program loads the token_map of truncated heads")
    return "; ".join(reasons)


def head_settings(dialect: str, heads: HeadsConfig) -> dict[str, Any]:
    """What `config.json` says of heads; for merged dialects, beside the backbone's keys."""
    if DIALECTS[dialect].architecture == HYDRA:
        return {
            "hydra_num_heads": heads.num_heads,
            "hydra_num_layers": heads.num_layers,
            "hydra_head_arch": "mlp",
            "grounded_heads": True,  # they see the tokens drafted before
        }
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


def backbone_settings(settings: Mapping[str, Any], dtype: str = "") -> dict[str, Any]:
    """A backbone's `config.json` without what it says of heads, for readers of any age.

    transformers 5 writes `rope_parameters` and `dtype`, which transformers 4 does not know: it
    would take the default for another `rope_theta`.

    Args:
      dtype: of the tensors, where it is to change.
    """
    plain = {key: value for key, value in settings.items() if key not in HEAD_KEYS}
    stored = plain.pop("dtype", None)
    if dtype or stored:
        plain["torch_dtype"] = dtype or stored
    rope = plain.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        plain.setdefault("rope_theta", rope["rope_theta"])
        if scaling.get("rope_type", "default") != "default":
            plain.setdefault("rope_scaling", scaling)
    return plain
