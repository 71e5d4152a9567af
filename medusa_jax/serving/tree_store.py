"""Tuned trees: where `medusa_jax.tune` leaves them and `--tree auto` looks.

Each model, device and precision has a JSON file under $MEDUSA_JAX_CACHE (default:
~/.cache/medusa_jax). It holds a tuning for each acceptance and batch size that was
asked for. A model directory may bring trees of its own in `medusa_trees.json`, for
the devices that its makers had.
"""

import dataclasses
import logging
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
from medusa_jax.drafting.tree_tables import MOST_TOKENS
from medusa_jax.errors import InputError
from medusa_jax.files import cache_directory, locked, writing

log = logging.getLogger(__name__)

BESIDE = "medusa_trees.json"
LOCK_SECONDS = 10.0  # in which another process adds its tuning


def cache_file(model: Model, dtype: str) -> Path:
    """Where this model's trees for this device are kept."""
    kind = re.sub(r"\W+", "-", device()).strip("-").lower()
    kind += f"-x{model.mesh.size}" if model.mesh else ""
    return cache_directory() / "trees" / f"{model.fingerprint}-{kind}-{dtype}.json"


def describe(acceptance: Acceptance) -> dict[str, Any]:
    """An acceptance as it is written down: {"scheme": "Lossless", "temperature": 1.0, ...}."""
    fields = dataclasses.asdict(acceptance) if dataclasses.is_dataclass(acceptance) else {}  # pyrefly: ignore
    return {"scheme": type(acceptance).__name__} | fields


def save(path: Path, tuning: dict[str, Any]) -> None:
    """Adds a tuning to a file, in place of an earlier tuning for the same acceptance and batch.

    Raises:
      InputError: the file holds something else.
      OutputError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)

    def same(other: dict[str, Any]) -> bool:
        return all(other.get(key) == tuning[key] for key in ("acceptance", "batch_size"))

    with locked(path.with_name(f"{path.name}.lock"), str(path), wait=LOCK_SECONDS):
        kept = [other for other in read(path) if not same(other)]
        json_files.write(path, {"tunings": [*kept, tuning]})


def read(path: Path) -> list[dict[str, Any]]:
    """The tunings of a file; none where it is not there.

    Raises:
      InputError: it is no file of tunings; names the file, the tuning and the field.
    """
    if not path.is_file():
        return []
    tunings = json_files.read_object(path).get("tunings")
    try:
        if not isinstance(tunings, list) or not all(isinstance(item, dict) for item in tunings):
            raise InputError(
                f"'tunings' must be a list of objects, got {json_files.short(tunings)}"
            )
        for number, tuning in enumerate(tunings):
            fields = json_files.Fields(tuning, f"tuning {number}")
            fields.inner("acceptance").text("scheme")
            fields.integer("batch_size")
            fields.text("backend", "")
            tree_of(tuning, fields.origin)
    except InputError as error:
        raise InputError(f"{path} is no file of tuned trees ({error}); delete it") from None
    return tunings


def tree_of(tuning: dict[str, Any], origin: str = "a tuning") -> Tree | DynamicTree:
    """The tree of a tuning: a list of nodes, or a recipe to grow a tree at every step.

    Raises:
      InputError: it is neither; the message begins with `origin`.
    """
    tree = tuning.get("tree")
    if not isinstance(tree, dict):
        return Tree.from_lists(tree, f"{origin}: 'tree': ")
    fields = json_files.Fields(tree, f"{origin}: 'tree'")
    return DynamicTree(
        fields.integer("size", most=MOST_TOKENS),
        fields.integer("depth", most=MOST_TOKENS),
        fields.integer("top_k", DynamicTree.top_k),
    )


def find(
    model: Model, acceptance: Acceptance, batch_size: int, dtype: str, *, own_heads: bool = True
) -> Tree | DynamicTree | None:
    """The tree tuned for this model here, else a tree that came with it for such a device.

    The same acceptance is looked for first, then its scheme at another
    temperature, then greedy's, then any; among equals the nearest batch size.

    Args:
      own_heads: the heads came with the model, so that the trees beside it are for them.

    Raises:
      InputError: a file is broken, or its tree is for other heads; names the file.
    """
    wanted = describe(acceptance)
    here, beside = cache_file(model, dtype), model.directory / BESIDE
    brought = read(beside) if own_heads else []
    brought = [tuning for tuning in brought if tuning.get("backend") == jax.default_backend()]

    def far(tuning: dict[str, Any]) -> tuple[bool, bool, bool, float]:
        found = tuning["acceptance"]
        apart = max(batch_size, tuning["batch_size"]) / min(batch_size, tuning["batch_size"])
        scheme = found["scheme"]
        return found != wanted, scheme != wanted["scheme"], scheme != Greedy.__name__, apart

    for path, tunings in ((here, read(here)), (beside, brought)):
        if tunings:
            nearest = min(tunings, key=far)
            if nearest["acceptance"] != wanted:
                log.info("no tree was tuned for %s: that of %s", wanted, nearest["acceptance"])
            tree = tree_of(nearest)
            try:
                tree.check(model.heads.num_heads, model.heads.truncated or model.config.vocab_size)
            except InputError as error:
                raise InputError(f"{path}: 'tree': {error}") from None
            return tree
    return None
