"""The mesh of a training run (data, fsdp, tensor), and how its batches lie on it."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medusa_jax.errors import InputError
from medusa_jax.training import settings

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # axes of the devices that share a batch's rows
BATCH = P(None, ROWS, None)  # arrays [A, B, T]
HIDDEN = P(ROWS, None, None)  # arrays [B, T, D]
# Else a TPU multiplies by each part of a weight as it arrives, and adds up large products in main
# memory: a step of Medusa-1 on a v5e:4x4 would take 2.5 times the cycles (docs/guides/train.md).
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


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


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What programs for the devices of a mesh are compiled with."""
    return TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None


def sharing_rows(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def put_together(weights: Any, sharding: NamedSharding | None) -> Any:
    """Weights that each device holds whole from here on; their gradients are left as they are.

    Else a compiler puts them together in each pass of a loop that multiplies by them.

    Args:
      sharding: of hidden states; None for one device. Weights split over `tensor` stay split.
    """
    if sharding is None or sharding.mesh.shape["tensor"] > 1:
        return weights
    place = NamedSharding(sharding.mesh, P())
    return jax.tree.map(lambda leaf: _placed(leaf, place) if leaf.ndim > 1 else leaf, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _placed(array: jax.Array, place: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(array, place)


_placed.defvjp(lambda array, place: (_placed(array, place), None), lambda *given: given[-1:])


def held_back(arrays: Any, before: Any) -> Any:
    """Arrays that are there together, once others are; what has no gradient gets none by that."""
    stopped, _ = jax.lax.optimization_barrier(jax.lax.stop_gradient((arrays, before)))
    return jax.tree.map(_instead, arrays, stopped)


@jax.custom_vjp
def _instead(array: jax.Array, same: jax.Array) -> jax.Array:
    return same


_instead.defvjp(lambda array, same: (same, None), lambda _, change: (change, None))


def check_batch(mesh: Mesh, optim: settings.Optim) -> None:
    """Raises InputError unless every device gets the same number of rows of each piece."""
    piece = optim.piece_rows
    ways = sharing_rows(mesh)
    if piece % ways:
        raise InputError(
            f"optim.batch_size {optim.batch_size} / optim.accumulation {optim.accumulation} = "
            f"{piece} rows do not divide over mesh.data x mesh.fsdp = {ways} devices"
        )
