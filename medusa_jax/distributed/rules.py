"""Which device holds what: one table from the names of arrays to the axes of a mesh.

The table is searched in paths, so it places an optimizer's moments, whose
paths end like their parameter's, with their parameter. Training splits over
(data, fsdp, tensor), see `training/mesh.py`; decoding over (tensor, group,
copy), which together are the devices of tensor parallelism: `decode_mesh`.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medusa_jax.distributed import partners
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.weight import Weight
from medusa_jax.param_paths import map_with_path

HEADS = ("tensor", "group")  # query heads are split over these, never cut
ALL = (*HEADS, "copy")
# Axes of [..., out, in]; a weight [in, out] has the last two the other way round. A mesh has the
# axes of training or those of decoding, and what it lacks splits nothing. What splits its outputs
# over `tensor` is followed by what splits its inputs over it, so that one sum a block crosses
# the devices.
RULES = (
    (r"/ns_coeffs$", (None,)),  # constants that Muon keeps in its state
    # Looked up by rows: parts of a row would have to be put together over all rows of the batch.
    (r"embedding$", P((*ALL, "fsdp"), None)),
    (r"(lm_head|vocab)$", P(ALL, "fsdp")),
    (r"query/weight$", P(HEADS, "fsdp")),
    (r"(key|value)/weight$", P("tensor", "fsdp")),
    (r"(gate|up)/weight$", P(ALL, "fsdp")),
    (r"(query|key|value|gate|up)/bias$", P("tensor")),
    (r"attention/out/weight$", P("fsdp", HEADS)),
    (r"down/weight$", P("fsdp", ALL)),
    (r"(query|key|value|gate|up|lm_head)/a$", P(None, "fsdp")),
    (r"(query|key|value|gate|up|lm_head)/b$", P("tensor", None)),
    (r"(out|down)/a$", P(None, "tensor")),
    (r"(out|down)/b$", P("fsdp", None)),
    # Of one head. With outputs over `tensor` too, XLA gets the gradients of Hydra heads wrong.
    (r"head_\d+/(block_\d+|residual|linear_\d+)/weight$", P(None, "fsdp")),
    (r"block_\d+/weight$", P(ALL, None)),  # of all heads, for decoding
    (r"selector/\w+/weight$", P()),  # small: a step multiplies a few rows with it
    (r"(scale|bias|token_map)$", P(None)),
    (r"^bigrams/", P()),  # of which a step reads a few numbers here and there
)


def start_processes() -> None:
    """Joins the other processes of a run, where there are any.

    Pods, SLURM and MPI are recognized by JAX itself. Local processes say who
    they are: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if len(given) == len(names):
        address, count, number = given.values()
        partners.join(address, int(count), int(number))
        return
    if given:
        raise InputError(f"{', '.join(given)} is set, but of {', '.join(names)} all are needed")
    try:
        partners.join()
    except ValueError:  # no cluster: this process is alone
        return
    except RuntimeError as error:
        # Whoever has used JAX in this process before has joined others by then, or is alone.
        if "before any JAX" not in str(error) and "only be called once" not in str(error):
            raise


def decode_mesh(text: str, config: ModelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (tensor, group, copy) that "tensor=N" means for a model.

    Heads are never cut. `tensor` devices hold different key/value heads; where that is one head
    each, the devices of a `group` hold the same one and different query heads of it. What is
    left of N are copies: they repeat each other's attention, and split all the rest, which are
    most of the weights.

    Examples: 8 query heads that share 4 key/value heads, "tensor=8": tensor 4, group 2, copy 1.
    The 52 heads of Llama 33B, each with its own keys, "tensor=8": tensor 4, group 1, copy 2.

    Args:
      devices: default: all of all processes. A process alone takes the first N of them.

    Raises:
      InputError: no such description, too few devices, devices that would have no part in
        it though their process must.
    """
    match = re.fullmatch(r"tensor=([1-9]\d*)", text)
    if match is None:
        raise InputError(f"mesh {text!r}: expected tensor=N, the number of devices, like tensor=4")
    count = int(match[1])
    devices = jax.devices() if devices is None else devices
    if count > len(devices) or (jax.process_count() > 1 and count != len(devices)):
        raise InputError(
            f"mesh {text} needs {count} devices; there are {len(devices)} in "
            f"{jax.process_count()} processes (simulated ones on a CPU: "
            f"JAX_NUM_CPU_DEVICES={count})"
        )
    kv_heads = config.num_kv_heads
    tensor = math.gcd(kv_heads, count)
    group = math.gcd(config.num_heads // kv_heads, count // tensor) if tensor == kv_heads else 1
    sizes = (tensor, group, count // (tensor * group))
    return jax.make_mesh(sizes, ALL, axis_types=(AxisType.Auto,) * 3, devices=devices[:count])


def spec(path: str, shape: tuple[int, ...], mesh: Mesh, order: str = "out_in") -> P:
    """Axes of an array; what an axis does not divide stays whole, a stack's dimension too.

    Args:
      order: of a weight's last two dimensions, see `model.weight.Weight`.

    Raises:
      InputError: no rule knows the path.
    """
    if not shape:
        return P()
    for pattern, axes in RULES:
        if re.search(pattern, path):
            if order == "in_out":
                axes = tuple(axes)[::-1]
            axes = (*(None,) * (len(shape) - len(axes)), *axes)
            return P(*(_fitting(names, n, mesh) for names, n in zip(axes, shape, strict=True)))
    raise InputError(f"no sharding rule for parameter {path} {list(shape)}")


def _fitting(
    axes: str | tuple[str, ...] | None, size: int, mesh: Mesh
) -> str | tuple[str, ...] | None:
    """Of a dimension's axes those that the mesh has, as many from the first on as divide it."""
    names = [
        name for name in ((axes,) if isinstance(axes, str) else axes or ()) if name in mesh.shape
    ]
    while size % math.prod(mesh.shape[name] for name in names):
        names.pop()
    return tuple(names) if len(names) > 1 else next(iter(names), None)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a pytree of arrays, shapes or stored tensors."""

    def sharding(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Weight):
            axes = spec(path, leaf.data.shape, mesh, leaf.order)
            scale = None
            if leaf.scale is not None:  # split as the outputs; an output's groups stay together
                out = axes[-2 if leaf.order == "out_in" else -1]
                scale = NamedSharding(mesh, P(*axes[:-2], out))
            return dataclasses.replace(leaf, data=NamedSharding(mesh, axes), scale=scale)
        return NamedSharding(mesh, spec(path, leaf.shape, mesh))

    return map_with_path(sharding, tree, is_leaf=lambda leaf: isinstance(leaf, Weight))


def put(
    read: Callable[[Any], Any], shape: tuple[int, ...], sharding: NamedSharding | None
) -> jax.Array:
    """An array on its devices, each of which gets no more than its part.

    Args:
      read: index -> that part of the array, on the host; `...` reads all of it.
      sharding: None for the default device. All processes must give the same array.
    """
    if sharding is None:
        return jax.device_put(read(...))
    parts: dict[str, Any] = {}  # devices that hold the same part share what was read

    def part(index: Any) -> Any:
        if str(index) not in parts:
            parts[str(index)] = read(index)
        return parts[str(index)]

    return jax.make_array_from_callback(shape, sharding, part)


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays of the host on every device of a mesh; without one, on the default device."""
    sharding = None if mesh is None else NamedSharding(mesh, P())
    return jax.tree.map(lambda array: put(array.__getitem__, array.shape, sharding), tree)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of a pytree, without any data."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )
