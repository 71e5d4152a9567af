"""Heads as the readers of a dialect need them: with a projection of the right form and size.

Heads may share a projection or guess among a part of the tokens, where a dialect's readers
know neither. Then the projection is written out: in each head, and with a row for each token.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from medusa_jax import json_files
from medusa_jax.checkpoints.backbone import open_backbone
from medusa_jax.checkpoints.dialects import DIALECTS, FOLDER, first_repeated, misread, shares
from medusa_jax.checkpoints.heads import StoredHeads, check_fit, zeros
from medusa_jax.checkpoints.hub import resolve
from medusa_jax.checkpoints.names import backbone_places, matched
from medusa_jax.checkpoints.stored_tensor import StoredTensor, Tensors
from medusa_jax.drafting.medusa_heads import HYDRA, HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig

MOST_TOKENS = 10_000_000  # of a vocabulary; a projection is allocated for as many

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Base:
    """A backbone in files, not read yet.

    Attributes:
      directory: where it is.
      settings: its `config.json`.
      config: the same, understood.
      tensors: by the path of their parameter, without heads stored among them.
    """

    directory: Path
    settings: dict[str, Any]
    config: ModelConfig
    tensors: Tensors

    @property
    def unembedding(self) -> StoredTensor:
        """Its projection to the vocabulary [V, D]."""
        return self.tensors.get("lm_head") or self.tensors["embed/embedding"]


def open_base(name: str | Path) -> Base:
    """The backbone of a directory or hub id. Raises InputError where there is none."""
    files = open_backbone(resolve(name))
    tensors = matched(backbone_places(files.config), files.tensors, files.directory)
    return Base(files.directory, files.settings, files.config, tensors)


def own_backbone(heads: StoredHeads) -> Path | None:
    """The directory of the backbone stored with heads, where there is one."""
    if heads.with_backbone:
        return heads.source
    place = heads.source if heads.source.is_dir() else heads.source.parent
    above = place.resolve().parent
    return above if place.name == FOLDER and (above / "config.json").is_file() else None


def check(heads: StoredHeads, target: str, *, as_is: bool) -> None:
    """Refuses heads that a dialect cannot hold, or that its readers would get wrong.

    Args:
      as_is: the projections are written as they are: warn, where the readers get it wrong.

    Raises:
      InputError: says why.
    """
    config, dialect = heads.config, DIALECTS[target]
    if config.architecture != dialect.architecture:
        raise InputError(
            f"--to {target} holds {dialect.architecture} heads, and these are "
            f"{config.architecture} heads"
        )
    if not config.shared and not dialect.own:
        raise InputError(
            f"--to {target}: there heads share the backbone's projection, and these heads have "
            "their own; v0.1 is the same with them"
        )
    if as_is and config.truncated and not dialect.names.token_map:
        raise InputError(f"--to {target} --as_is: this dialect has no place for a token_map")
    if dialect.repeated and _repeated(heads):
        config = dataclasses.replace(config, num_layers=1 + first_repeated(config))
    if not as_is:  # then the projections will be those that the readers need
        config = dataclasses.replace(config, shared=False, truncated=0)
    if not (wrong := misread(target, config)):
        return
    if not as_is:
        raise InputError(f"--to {target}: {wrong}; --as_is writes them for medusa_jax")
    log.warning("--to %s --as_is: %s; medusa_jax reads them", target, wrong)


def why_backbone(heads: StoredHeads, target: str, *, as_is: bool) -> str:
    """What the backbone's weights are needed for; empty: nothing."""
    config, dialect = heads.config, DIALECTS[target]
    stored, omitted = "vocab" in heads.tensors, _omits(target, config, as_is=as_is)
    if dialect.merged:
        return f"--to {target} holds the backbone too"
    if config.shared and not stored and not omitted:
        return f"--to {target} stores the projection that these heads share"
    if stored and omitted:
        return f"--to {target} has no projection, so that of these heads must be the backbone's"
    if config.truncated and "vocab_size" not in heads.settings:
        return f"--to {target} needs the size of the vocabulary, and these heads are truncated"
    return ""


def fitted(
    heads: StoredHeads, target: str, base: Base | None, *, as_is: bool
) -> tuple[HeadsConfig, Tensors]:
    """The heads, by parameter path, with the projections that a dialect's readers need.

    Args:
      base: the backbone, where `why_backbone` gives a reason.
      as_is: truncated projections stay truncated, and shared ones shared.

    Raises:
      InputError: the backbone does not fit, or the heads share a projection of their own that
        the dialect cannot hold.
    """
    config, tensors = heads.config, dict(heads.tensors)
    if base:
        check_fit(heads, base.config)
    ids = tensors["token_map"].read() if config.truncated else None
    size = base.config.vocab_size if base else config.vocab_size
    if ids is not None and not base:
        size = _stated_size(heads, ids)
    config = dataclasses.replace(config, vocab_size=size)
    place = DIALECTS[target].names.selector
    if config.selector and not (as_is and place):
        why = "left out; --as_is keeps it" if place else "left out, since it has no place there"
        log.warning("--to %s: the selector of these heads is %s", target, why)
        config = dataclasses.replace(config, selector=0)
    stored = tensors.pop("vocab", None)
    if ids is not None and not as_is:
        del tensors["token_map"]
        config = dataclasses.replace(config, truncated=0)
        for path in [path for path in tensors if path.endswith(("/vocab", "/vocab_bias"))]:
            tensors[path] = with_all_rows(tensors[path], ids, size)
    if not config.shared:
        return config, tensors
    if _omits(target, config, as_is=as_is):
        if stored and base:
            _check_same(stored, base, ids, target)
        return config, tensors
    if stored is None:
        assert base  # `why_backbone` asks for it
        stored = base.unembedding.rows(ids) if as_is and ids is not None else base.unembedding
    elif ids is not None and not as_is:
        stored = with_all_rows(stored, ids, size)
    if DIALECTS[target].names.shared:
        return config, tensors | {"vocab": stored}
    written_out = {f"head_{number}/vocab": stored for number in range(config.num_heads)}
    if DIALECTS[target].names.vocab_bias:
        written_out |= {f"{path}_bias": zeros(stored) for path in written_out}
    return dataclasses.replace(config, shared=False), tensors | written_out


def with_all_rows(rows: StoredTensor, ids: np.ndarray, size: int) -> StoredTensor:
    """A truncated projection [W, D] with a row for each of `size` tokens [V, D].

    Rows that are missing become the mean of those that are there. Its logit is the mean of
    theirs: never the greatest, whatever the hidden state, and so the guesses stay. (Zeros would
    win where all logits are negative.)

    Example: rows [[1, 0], [0, 3]], ids [2, 0], size 3 -> [[0, 3], [0.5, 1.5], [1, 0]]
    """

    def read(index: Any = ...) -> np.ndarray:
        known = rows.read()
        mean = known.astype(np.float64).mean(axis=0).astype(known.dtype)
        whole = np.broadcast_to(mean, (size, *known.shape[1:])).copy()
        whole[ids] = known
        return whole[index]

    return StoredTensor((size, *rows.shape[1:]), rows.dtype, read)


def same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    ours, theirs = (np.ascontiguousarray(x.read()).reshape(-1).view(np.uint8) for x in (one, other))
    return np.array_equal(ours, theirs)


def rounded(tensors: Tensors, dtype: str) -> Tensors:
    """Tensors with their floating-point numbers in another type; "" keeps each as it is."""
    floats = {name for name, tensor in tensors.items() if "float" in tensor.dtype}
    return {
        name: tensor.cast(dtype) if dtype and name in floats else tensor
        for name, tensor in tensors.items()
    }


def _omits(target: str, config: HeadsConfig, *, as_is: bool) -> bool:
    """Whether files of a dialect hold no projection of such heads, since it is the backbone's."""
    kept = as_is or shares(target, config)
    return config.shared and kept and not DIALECTS[target].names.shared


def _stated_size(heads: StoredHeads, ids: np.ndarray) -> int:
    """The size of the vocabulary of truncated heads, as their `config.json` says it."""
    stated = json_files.Fields(heads.settings, f"{heads.source}: config.json")
    size = stated.integer("vocab_size", most=MOST_TOKENS)
    if ids.min() < 0 or ids.max() >= size:
        raise InputError(f"{heads.source}: token_map has ids beyond a vocabulary of {size}")
    return size


def _repeated(heads: StoredHeads) -> bool:
    """Whether each head's blocks are equal, as those are that the original has trained."""
    tensors = heads.tensors
    first, name = first_repeated(heads.config), "block"
    if heads.config.architecture == HYDRA:
        name = "linear"
    return all(
        same(tensors[f"head_{h}/{name}_{first}/{part}"], tensors[f"head_{h}/{name}_{i}/{part}"])
        for h in range(heads.config.num_heads)
        for i in range(first + 1, heads.config.num_layers)
        for part in ("bias", "weight")
    )


def _check_same(stored: StoredTensor, base: Base, ids: np.ndarray | None, target: str) -> None:
    """Raises InputError unless a stored projection is the backbone's, or its rows `ids`."""
    whole = base.unembedding if ids is None else base.unembedding.rows(ids)
    if not same(stored, whole.cast(stored.dtype)):
        raise InputError(
            f"--to {target}: the projection that these heads share is not that of "
            f"{base.directory}; vllm can hold it"
        )
