"""The training step through the compiler of a machine that is not here, and its memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medusa_jax.compile_only import Memory, compile_for
from medusa_jax.sharding import abstract
from medusa_jax.topology import devices
from medusa_jax.training import settings, sharding
from medusa_jax.training.objective import Objective
from medusa_jax.training.optimizer import optimizer
from medusa_jax.training.settings import Config
from medusa_jax.training.state import Ramp, make_step
from medusa_jax.training.trainer import check_length, starting_state
from medusa_jax.training.weights import Weights, heads_shape, layout, model_shape, split


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
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return compile_for(topology, f"{topology} ({shape})", lambda: lower(config, mesh))


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
