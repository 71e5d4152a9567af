"""The training step through the compiler of a machine that is not here, and its memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medusa_jax.distributed.aot import Memory, compile_for
from medusa_jax.distributed.cycles import cycles
from medusa_jax.distributed.hlo import Program
from medusa_jax.distributed.rules import abstract
from medusa_jax.distributed.topology import devices
from medusa_jax.training import flops, settings
from medusa_jax.training.mesh import BATCH, HIDDEN, check_batch, make_mesh
from medusa_jax.training.objective import rows_chunk
from medusa_jax.training.settings import Config
from medusa_jax.training.setup import assemble
from medusa_jax.training.trainer import check_length
from medusa_jax.training.weights import Weights, heads_shape, model_shape, plan, split


def compile_step(config: Config, topology: str) -> Memory:
    """Compiles a run's training step for a topology, prints what it costs, returns its memory.

    Raises:
      InputError: settings or topology are wrong.
      DoesNotFit: it needs more than a chip's memory.
    """
    settings.check(config)
    mesh = make_mesh(config.mesh, devices(topology))
    check_batch(mesh, config.optim)
    check_length(config, model_shape(config, absent=True))
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    name = f"{topology} ({shape})"
    compiled = compile_for(topology, name, mesh, lambda: trace(config, mesh).lower())
    done, least = step_flops(config)
    print(f"{done:.4g} FLOPs in products of a step, {done / least:.2f} times the model's")
    passes = chunks(config, NamedSharding(mesh, HIDDEN))
    estimate = cycles(Program.parse(compiled.as_text()), passes)
    if estimate is not None:
        print(f"{estimate / 1e6:,.0f} M cycles of a device, by its compiler's estimate")
    return Memory.of(compiled)


def step_flops(config: Config) -> tuple[float, float]:
    """FLOPs of a step's products as they are traced, and those that the model needs."""
    model = model_shape(config, absent=True)
    alone = make_mesh(settings.Mesh(1, 1, 1), jax.devices()[:1])
    return (
        flops.traced(trace(config, alone).jaxpr.jaxpr, chunks(config)),
        flops.needed(config, model, heads_shape(config, model)),
    )


def chunks(config: Config, sharding: NamedSharding | None = None) -> int:
    """Chunks of a piece's positions when all are learnt; `sharding` is that of hidden states."""
    length = config.data.sequence_length
    chunk = rows_chunk(config.loss.chunk, config.optim.piece_rows, sharding) or length
    return -(-length // chunk)


def trace(config: Config, mesh: Mesh) -> Any:
    """The step of a run, traced for a mesh from shapes alone."""
    model = model_shape(config, absent=True)
    heads = heads_shape(config, model)
    table = plan(config, model, heads)
    leaves = {path: jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype)) for path, p in table.items()}
    trainable, frozen = split(leaves, table)
    weights = Weights(model, heads, trainable, abstract(frozen, mesh))
    state, program = assemble(config, weights, mesh, config.optim.steps or 1000, donate=False)
    pieces = config.optim.accumulation
    shape = (pieces, config.optim.piece_rows, config.data.sequence_length)
    place = NamedSharding(mesh, BATCH)
    batch = {
        key: jax.ShapeDtypeStruct(shape, kind, sharding=place)
        for key, kind in (
            ("tokens", jnp.int32),
            ("segments", jnp.int32),
            ("positions", jnp.int32),
            ("learnt", jnp.bool_),
        )
    }
    if config.data.hidden_states:
        wide = (*shape, model.hidden_size)
        batch["hidden"] = jax.ShapeDtypeStruct(wide, jnp.bfloat16, sharding=place)
    with_lm = jax.ShapeDtypeStruct((), jnp.bool_, sharding=NamedSharding(mesh, PartitionSpec()))
    return program.step.trace(state, weights.frozen, batch, with_lm)
