"""Memory of a compiled function on a machine that is not here, by that machine's own compiler."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from medusa_jax.distributed.topology import chip_bytes


class DoesNotFit(RuntimeError):
    """It needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler counts them.

    Attributes:
      arguments: parameters, and the state that is advanced.
      temporaries: the most that lives at once beside them.
      outputs: not in an argument's place.
      aliased: outputs in the place of a donated argument, such as the cache.
      offloaded: temporaries in the memory of its host, not in the total.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        """What the device must have."""
        return self.arguments + self.temporaries + self.outputs

    @classmethod
    def of(cls, compiled: Any) -> "Memory":
        """Of a compiled function."""
        found = compiled.memory_analysis()
        aliased = found.alias_size_in_bytes
        return cls(
            found.argument_size_in_bytes,
            found.temp_size_in_bytes,
            found.output_size_in_bytes - aliased,
            aliased,
            found.host_temp_size_in_bytes,
        )


def compile_within(name: str, mesh: Mesh, make: Callable[[], Any]) -> tuple[Any, float]:
    """What `make` lowers and compiles, and the seconds that it took.

    Args:
      name: of what is compiled, for the message.
      mesh: the devices that it is compiled for.

    Raises:
      DoesNotFit: the compiler says that it needs more than a chip's memory.
    """
    start = time.perf_counter()
    try:
        with _target(mesh):
            compiled = make()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(f"{name}: {_shortage(str(error))}") from None
    return compiled, time.perf_counter() - start


def compile_for(topology: str, name: str, mesh: Mesh, lower: Callable[[], Any]) -> Any:
    """What `lower` lowers, compiled for a topology; prints its memory.

    Args:
      topology: a name that `topology.devices` knows.
      name: of what is compiled, before the figures.
      mesh: devices of the topology.

    Raises:
      DoesNotFit: it needs more than a chip's memory.
    """
    limit = chip_bytes(topology)
    compiled, seconds = compile_within(name, mesh, lambda: lower().compile())
    memory = Memory.of(compiled)
    gib = {field: f"{size / 2**30:.2f}" for field, size in dataclasses.asdict(memory).items()}
    print(
        f"{name}: {memory.total / 2**30:.2f} GiB per device"
        + (f" of {limit / 2**30:.0f}" if limit else "")
        + f" (arguments {gib['arguments']}, temporaries {gib['temporaries']}, outputs "
        f"{gib['outputs']}, in place {gib['aliased']}"
        + (f", with its host {gib['offloaded']}" if memory.offloaded else "")
        + f"); compiled in {seconds:.0f} s",
        flush=True,
    )
    if limit and memory.total > limit:
        raise DoesNotFit(f"{name}: {memory.total:,} bytes per device exceed {limit:,}")
    return compiled


def _target(mesh: Mesh) -> Any:
    """Where Pallas lowers kernels for these devices; a GPU that is here it would find by itself."""
    if mesh.devices.flat[0].platform != "gpu":
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _shortage(message: str) -> str:
    """What the compiler says about memory that is short, in one of its two ways.

    "Used 26.54G of 15.75G hbm", "(30.86G) exceeds available HBM (15.75G)".
    """
    amounts = r"Used ([\d.]+\w) of ([\d.]+\w)|\(([\d.]+\w)\) exceeds available \w+ \(([\d.]+\w)\)"
    found = re.search(amounts, message)
    if found is None:
        return message.strip().splitlines()[0]
    needed, there = filter(None, found.groups())
    return f"needs {needed} per device, which has {there}"
