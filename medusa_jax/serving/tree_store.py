"""Tuned trees: where `medusa_jax.tune` leaves them and `--tree auto` looks.

One JSON file a model, device and precision, under $MEDUSA_JAX_CACHE (default:
~/.cache/medusa_jax), with a tuning for each acceptance and batch size that was
asked for. A model directory may bring trees of its own in `medusa_trees.json`,
for the kinds of device its makers had.
"""

import dataclasses
import logging
import os
import re
from pathlib import Path
from typing import Any

import jax

from medusa_jax import json_files
from medusa_jax.checkpoints.load import Model
from medusa_jax.decoding.acceptance import Acceptance, Greedy
from medusa_jax.distributed.hardware import device
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError

log = logging.getLogger(__name__)

BESIDE = "medusa_trees.json"


def cache_file(model: Model, dtype: str) -> Path:
    """Where this model's trees for this device are kept."""
    home = os.environ.get("MEDUSA_JAX_CACHE") or Path.home() / ".cache" / "medusa_jax"
    kind = re.sub(r"\W+", "-", device()).strip("-").lower()
    kind += f"-x{model.mesh.size}" if model.mesh else ""
    return Path(home) / "trees" / f"{model.fingerprint}-{kind}-{dtype}.json"


def describe(acceptance: Acceptance) -> dict[str, Any]:
    """An acceptance as it is written down: {"scheme": "Lossless", "temperature": 1.0, ...}."""
    fields = dataclasses.asdict(acceptance) if dataclasses.is_dataclass(acceptance) else {}  # pyrefly: ignore
    return {"scheme": type(acceptance).__name__} | fields


def save(path: Path, tuning: dict[str, Any]) -> None:
    """Adds a tuning to a file, in place of one for the same acceptance and batch size."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def same(other: dict[str, Any]) -> bool:
        return all(other.get(key) == tuning[key] for key in ("acceptance", "batch_size"))

    kept = [one for one in read(path) if not same(one)]
    json_files.write(path, {"tunings": [*kept, tuning]})


def read(path: Path) -> list[dict[str, Any]]:
    """The tunings of a file; none where it is not there.

    Raises:
      InputError: it is no file of tunings.
    """
    if not path.is_file():
        return []
    try:
        tunings = json_files.read_object(path)["tunings"]
        for one in tunings:
            tree_of(one)
            _ = one["acceptance"]["scheme"], one["batch_size"]
    except (OSError, ValueError, KeyError, TypeError, InputError) as error:
        raise InputError(f"{path} is no file of tuned trees ({error}); delete it") from None
    return tunings


def tree_of(tuning: dict[str, Any]) -> Tree | DynamicTree:
    """The tree of a tuning: a list of nodes, or a recipe to grow one at every step."""
    tree = tuning["tree"]
    return DynamicTree(**tree) if isinstance(tree, dict) else Tree.from_lists(tree)


def find(
    model: Model, acceptance: Acceptance, batch_size: int, dtype: str, *, own_heads: bool = True
) -> Tree | DynamicTree | None:
    """The tree tuned for this model here, else one that came with it for such a device.

    The same acceptance is looked for first, then its scheme at another
    temperature, then greedy's, then any; among equals the nearest batch size.

    Args:
      own_heads: the heads came with the model, so that the trees beside it are for them.
    """
    wanted = describe(acceptance)
    here = read(cache_file(model, dtype))
    brought = read(model.directory / BESIDE) if own_heads else []
    brought = [tuning for tuning in brought if tuning.get("backend") == jax.default_backend()]

    def far(tuning: dict[str, Any]) -> tuple[bool, bool, bool, float]:
        found = tuning["acceptance"]
        apart = max(batch_size, tuning["batch_size"]) / min(batch_size, tuning["batch_size"])
        scheme = found["scheme"]
        return found != wanted, scheme != wanted["scheme"], scheme != Greedy.__name__, apart

    for tunings in (here, brought):
        if tunings:
            nearest = min(tunings, key=far)
            if nearest["acceptance"] != wanted:
                log.info("no tree was tuned for %s: that of %s", wanted, nearest["acceptance"])
            return tree_of(nearest)
    return None
