"""Tuned trees: where `medusa_jax.tune` leaves them and `--tree auto` looks.

Each model, device, way of computing products and precision has a JSON file under
$MEDUSA_JAX_CACHE (default: ~/.cache/medusa_jax). It holds a tuning for each acceptance
and batch size that was asked for. A model directory may bring trees of its own in
`medusa_trees.json`, for the devices that its makers had.
"""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import jax

from medusa_jax import json_files
from medusa_jax.checkpoints.load import Model
from medusa_jax.checkpoints.weight_layout import products
from medusa_jax.decoding.acceptance import Acceptance, Greedy
from medusa_jax.distributed.hardware import accelerated, device
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.drafting.tree_tables import MOST_TOKENS
from medusa_jax.errors import InputError
from medusa_jax.files import cache_directory, locked, writing

log = logging.getLogger(__name__)

BESIDE = "medusa_trees.json"
LOCK_SECONDS = 10.0  # in which another process adds its tuning


@dataclasses.dataclass(frozen=True)
class Found:
    """A tuning for a model.

    Attributes:
      path: the file that holds it.
      tuning: as it is written there.
      here: it was measured on a machine like this, with the same products and precision.
    """

    path: Path
    tuning: dict[str, Any]
    here: bool


def conditions(model: Model, dtype: str) -> dict[str, Any]:
    """What the time of a step depends on, beside the model, as tunings say it.

    {"device": "cpu AMD EPYC 2", "products": "vnni", "dtype": "float32", "devices": 1}
    """
    return {
        "device": device(),
        "products": products(model.parameters.shapes),
        "dtype": dtype,
        "devices": model.mesh.size if model.mesh else 1,
    }


def cache_file(model: Model, dtype: str) -> Path:
    """Where this model's trees for this device are kept.

    On a CPU its name ends with "-cpu-amd-epyc-2-vnni-float32.json".
    """
    here = conditions(model, dtype)
    kind = re.sub(r"\W+", "-", here["device"]).strip("-").lower()
    kind += "" if accelerated() else f"-{here['products']}"
    kind += f"-x{here['devices']}" if model.mesh else ""
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
            accepted_lengths(tuning, fields.origin)
    except InputError as error:
        raise InputError(f"{path} is no file of tuned trees ({error}); delete it") from None
    return tunings


def tree_of(tuning: dict[str, Any], origin: str = "a tuning") -> Tree | DynamicTree:
    """The tree of a tuning: a list of nodes, or a recipe to grow a tree at every step.

    Raises:
      InputError: it is neither; the message begins with `origin`.
    """
    tree = tuning.get("tree")
    return _tree(tree, f"{origin}: 'tree'")


def shape(tree: Tree | DynamicTree) -> list[list[int]] | dict[str, int]:
    """A tree as tunings write it down."""
    return [list(node) for node in tree.nodes] if isinstance(tree, Tree) else vars(tree)


def accepted_lengths(
    tuning: dict[str, Any], origin: str = "a tuning"
) -> list[tuple[Tree | DynamicTree, float]]:
    """The trees that a tuning describes, and the mean accepted length of each.

    Those are its rows with a "shape", which older tunings lack, timed or not, and its best tree.

    Raises:
      InputError: a row is wrong; the message begins with `origin`.
    """
    best, rows = tuning.get("best"), tuning.get("table", [])
    if not isinstance(rows, list):
        raise InputError(f"{origin}: 'table' must be a list, got {json_files.short(rows)}")
    untimed = tuning.get("untimed", [])
    if not isinstance(untimed, list):
        raise InputError(f"{origin}: 'untimed' must be a list, got {json_files.short(untimed)}")
    rows = [*rows, *untimed]
    if isinstance(best, dict):
        rows = [best | {"shape": tuning.get("tree")}, *rows]
    found = []
    for number, row in enumerate(rows):
        if isinstance(row, dict) and "shape" in row:
            fields = json_files.Fields(row, f"{origin}: row {number}")
            length = fields.number("mean_accepted_length", least=1)
            found.append((_tree(row["shape"], f"{fields.origin}: 'shape'"), length))
    return found


def _tree(tree: Any, origin: str) -> Tree | DynamicTree:
    if not isinstance(tree, dict):
        return Tree.from_lists(tree, f"{origin}: ")
    fields = json_files.Fields(tree, origin)
    return DynamicTree(
        fields.integer("size", most=MOST_TOKENS),
        fields.integer("depth", most=MOST_TOKENS),
        fields.integer("top_k", DynamicTree.top_k),
    )


def find(
    model: Model, acceptance: Acceptance, batch_size: int, dtype: str, *, own_heads: bool = True
) -> Found | None:
    """The tuning for this model here, else that of another machine of this kind.

    The same acceptance is looked for first, then its scheme at another
    temperature, then greedy's, then any; among equals the nearest batch size.

    Args:
      own_heads: the heads came with the model, so that the trees beside it are for them.

    Raises:
      InputError: a file is broken, or its tree is for other heads; names the file.
    """
    wanted, now = describe(acceptance), conditions(model, dtype)
    here, beside = cache_file(model, dtype), model.beside / BESIDE
    others = sorted(here.parent.glob(f"{model.fingerprint}-*-{dtype}.json"))
    found = [Found(here, tuning, True) for tuning in read(here)]
    for path in [*(other for other in others if other != here), *([beside] if own_heads else [])]:
        for tuning in read(path):
            if tuning.get("backend") == jax.default_backend():
                same = all(tuning.get(key) == value for key, value in now.items())
                found.append(Found(path, tuning, same))

    def fits(one: Found) -> bool:  # what was timed in haste is for that acceptance and batch
        same = one.tuning["acceptance"], one.tuning["batch_size"]
        return not one.tuning.get("quick") or (one.here and same == (wanted, batch_size))

    def far(one: Found) -> tuple[bool, bool, bool, bool, float]:
        tuned, batch = one.tuning["acceptance"], one.tuning["batch_size"]
        apart = max(batch_size, batch) / min(batch_size, batch)
        scheme = tuned["scheme"]
        greedy = Greedy.__name__
        return not one.here, tuned != wanted, scheme != wanted["scheme"], scheme != greedy, apart

    nearest = min(filter(fits, found), key=far, default=None)
    if nearest is None:
        return None
    if nearest.tuning["acceptance"] != wanted:
        log.info("no tree was tuned for %s: that of %s", wanted, nearest.tuning["acceptance"])
    try:
        heads = model.heads.num_heads, model.heads.truncated or model.config.vocab_size
        tree_of(nearest.tuning).check(*heads)
        for tree, _ in accepted_lengths(nearest.tuning):
            tree.check(*heads)
    except InputError as error:
        raise InputError(f"{nearest.path}: 'tree': {error}") from None
    return nearest
