"""The training step through the compiler of a machine that is not here, and its memory."""

import dataclasses
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medusa_jax.sharding import abstract
from medusa_jax.training import settings, sharding
from medusa_jax.training.objective import Objective
from medusa_jax.training.optimizer import optimizer
from medusa_jax.training.settings import Config
from medusa_jax.training.state import Ramp, make_step
from medusa_jax.training.topology import chip_bytes, devices
from medusa_jax.training.trainer import check_length, starting_state
from medusa_jax.training.weights import Weights, heads_shape, layout, model_shape, split


class DoesNotFit(RuntimeError):
    """The step needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler counts them.

    Attributes:
      arguments: parameters, optimizer state and batch.
      temporaries: the most that lives at once beside them.
      outputs: not in an argument's place.
    """

    arguments: int
    temporaries: int
    outputs: int

    @property
    def total(self) -> int:
        """What the device must have."""
        return self.arguments + self.temporaries + self.outputs

    @classmethod
    def of(cls, compiled: Any) -> "Memory":
        """Of a compiled function."""
        found = compiled.memory_analysis()
        new = found.output_size_in_bytes - found.alias_size_in_bytes
        return cls(found.argument_size_in_bytes, found.temp_size_in_bytes, new)


def compile_step(config: Config, topology: str) -> Memory:
    """Compiles a run's training step for a topology, prints and returns its memory.

    Raises:
      InputError: settings or topology are wrong.
      DoesNotFit: it needs more than a chip's memory.
    """
    settings.check(config)
    mesh = sharding.make_mesh(config.mesh, devices(topology))
    sharding.check_batch(mesh, config.optim)
    check_length(config, model_shape(config, absent=True))
    start = time.perf_counter()
    lowered = lower(config, mesh)
    try:
        memory = Memory.of(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(f"{topology}: {str(error).strip().splitlines()[0]}") from None
    limit = chip_bytes(topology)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    gib = {field: f"{size / 2**30:.2f}" for field, size in dataclasses.asdict(memory).items()}
    print(
        f"{topology} ({shape}): {memory.total / 2**30:.2f} GiB per device"
        + (f" of {limit / 2**30:.0f}" if limit else "")
        + f" (arguments {gib['arguments']}, temporaries {gib['temporaries']}, outputs "
        f"{gib['outputs']}); compiled in {time.perf_counter() - start:.0f} s"
    )
    sys.stdout.flush()
    if limit and memory.total > limit:
        raise DoesNotFit(f"{topology}: {memory.total:,} bytes per device exceed {limit:,}")
    return memory


def lower(config: Config, mesh: Mesh) -> Any:
    """The step of a run, lowered for a mesh from shapes alone."""
    model = model_shape(config, absent=True)
    heads = heads_shape(config, model)
    table = layout(config, model, heads)
    leaves = {path: jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype)) for path, p in table.items()}
    trainable, frozen = split(leaves, table)
    steps = config.optim.steps or 1000  # only schedules depend on it
    rule = optimizer(config, steps)
    weights = Weights(model, heads, trainable, abstract(frozen, mesh))
    state, places = starting_state(weights, rule, mesh, donate=False)
    pieces = config.optim.accumulation
    shape = (pieces, config.optim.batch_size // pieces, config.data.sequence_length)
    place = NamedSharding(mesh, sharding.BATCH)
    batch = {
        key: jax.ShapeDtypeStruct(shape, kind, sharding=place)
        for key, kind in (
            ("tokens", jnp.int32),
            ("segments", jnp.int32),
            ("positions", jnp.int32),
            ("learnt", jnp.bool_),
        )
    }
    objective = Objective.of(config, model, heads, NamedSharding(mesh, sharding.HIDDEN))
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = make_step(
        objective, rule, Ramp.of(config.loss, steps), config.seed, (places, everywhere)
    )
    return step.lower(state, weights.frozen, batch)
