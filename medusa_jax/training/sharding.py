"""Which device holds what: one mesh, and one table from parameter names to its axes.

The table is searched in paths, so it places an optimizer's moments, whose
paths end like their parameter's, with their parameter.
"""

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medusa_jax.errors import InputError
from medusa_jax.training import settings
from medusa_jax.tree_paths import map_with_path

AXES = ("data", "fsdp", "tensor")
# Weights are [out, in]. What splits its outputs over `tensor` is followed by
# what splits its inputs over it, so that one sum a block crosses the devices.
RULES = (
    (r"/ns_coeffs$", (None,)),  # constants that Muon keeps in its state
    (r"/token_map$", P(None)),
    # Looked up by rows: parts of a row would have to be put together over all rows of the batch.
    (r"embedding$", P(("tensor", "fsdp"), None)),
    (r"(lm_head|vocab)$", P("tensor", "fsdp")),
    (r"(query|key|value|gate|up)/weight$", P("tensor", "fsdp")),
    (r"(query|key|value|gate|up)/bias$", P("tensor")),
    (r"(out|down)/weight$", P("fsdp", "tensor")),
    (r"(query|key|value|gate|up|lm_head)/a$", P(None, "fsdp")),
    (r"(query|key|value|gate|up|lm_head)/b$", P("tensor", None)),
    (r"(out|down)/a$", P(None, "tensor")),
    (r"(out|down)/b$", P("fsdp", None)),
    (r"block_\d+/weight$", P(None, "fsdp")),
    (r"(scale|bias)$", P(None)),
)
BATCH = P(None, ("data", "fsdp"), None)  # arrays [A, B, T]
HIDDEN = P(("data", "fsdp"), None, None)  # arrays [B, T, D]


def start_processes() -> None:
    """Joins the other processes of a run, where there are any.

    Pods, SLURM and MPI are recognised by JAX itself. Local processes say who
    they are: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if len(given) == len(names):
        address, count, number = given.values()
        jax.distributed.initialize(address, int(count), int(number))
        return
    if given:
        raise InputError(f"{', '.join(given)} is set, but of {', '.join(names)} all are needed")
    try:
        jax.distributed.initialize()
    except ValueError:  # no cluster: this process is alone
        return
    except RuntimeError as error:
        # Whoever has used JAX in this process before has joined others by then, or is alone.
        if "before any JAX" not in str(error) and "only be called once" not in str(error):
            raise


def make_mesh(mesh: settings.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    shown = f"mesh (data {mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor})"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"{shown}: expected positive sizes, one of which may be -1")
    fixed = math.prod(size for size in sizes if size != -1)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise InputError(
            f"{shown} needs {'a multiple of ' if -1 in sizes else ''}{fixed} devices; "
            f"there are {len(devices)}"
        )
    sizes = [size if size != -1 else len(devices) // fixed for size in sizes]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_batch(mesh: Mesh, optim: settings.Optim) -> None:
    """Raises InputError unless every device gets the same number of rows of each piece."""
    piece = optim.batch_size // optim.accumulation
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if piece % ways:
        raise InputError(
            f"optim.batch_size {optim.batch_size} / optim.accumulation {optim.accumulation} = "
            f"{piece} rows do not divide over mesh.data x mesh.fsdp = {ways} devices"
        )


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Axes of a parameter; a dimension that its axis does not divide stays whole, a stack's too.

    Raises:
      InputError: no rule knows the path.
    """
    if not shape:
        return P()
    for pattern, axes in RULES:
        if re.search(pattern, path):
            axes = (*(None,) * (len(shape) - len(axes)), *axes)
            fitting = [
                axis if size % _ways(axis, mesh) == 0 else None
                for axis, size in zip(axes, shape, strict=True)
            ]
            return P(*fitting)
    raise InputError(f"no sharding rule for parameter {path} {list(shape)}")


def _ways(axes: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    """Into how many parts a dimension falls."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a pytree of arrays or shapes."""
    return map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path, leaf.shape, mesh)), tree)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of a pytree, without any data."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )
