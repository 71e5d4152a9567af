"""Training steps on a mesh, as a script: several devices, or several processes, need their own.

    python tests/steps.py OUT MODE:DATA,FSDP,TENSOR [MODE:DATA,FSDP,TENSOR ...]

Writes OUT-<mode>:<mesh>.npz: loss, gradient norm and all updated parameters after two steps.
Devices and processes come from the environment (XLA_FLAGS, JAX_COORDINATOR_ADDRESS, ...).
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from helpers.hlo import Program
from helpers.models import TINY
from medusa_jax.data.encoding import Encoded
from medusa_jax.data.loader import global_arrays
from medusa_jax.data.packing import pack
from medusa_jax.distributed.rules import spec, start_processes
from medusa_jax.param_paths import flat
from medusa_jax.training import lora, settings
from medusa_jax.training.mesh import BATCH, check_batch, make_mesh
from medusa_jax.training.settings import Config, Heads, Lora, Loss, Optim
from medusa_jax.training.setup import assemble
from medusa_jax.training.weights import Weights, heads_shape, plan, split

ROWS, LENGTH = 16, 16


def config_of(mode: str) -> Config:
    return Config(
        mode="medusa1" if mode in ("medusa1", "hydra") else "medusa2",
        model=settings.Backbone(
            dtype="float32", kept=("query", "gate"), offloaded=("input", "key", "up")
        ),
        heads=Heads("hydra" if mode == "hydra" else "medusa", number=2),
        lora=Lora(rank=0 if mode == "full" else 4, dropout=0.0),
        loss=Loss(chunk=8, distill=mode == "lora"),
        # A large epsilon would hide sign flips; a plain rate shows any difference in gradients.
        optim=Optim(learning_rate=1e-3, warmup_steps=0, batch_size=ROWS, accumulation=2),
    )


def weights_of(config: Config, mesh: Any) -> Weights:
    heads = heads_shape(config, TINY)
    table = plan(config, TINY, heads)

    def make(path: str) -> jax.Array:
        shape = table[path].shape
        place = NamedSharding(mesh, spec(path, shape, mesh))
        values = 0.1 * jax.random.normal(lora.path_key(jax.random.key(0), path), shape)
        values = np.asarray(values + (1.0 if path.endswith("scale") else 0.0))
        return jax.make_array_from_callback(shape, place, lambda index: values[index])

    trainable, frozen = split({path: make(path) for path in table}, table)
    return Weights(TINY, heads, trainable, frozen)


def run(mode: str, sizes: tuple[int, int, int]) -> dict[str, np.ndarray]:
    count = sizes[0] * sizes[1] * sizes[2]
    devices = jax.devices()[:count] if count == 1 else None
    config, mesh = config_of(mode), make_mesh(settings.Mesh(*sizes), devices)
    check_batch(mesh, config.optim)
    weights = weights_of(config, mesh)
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, LENGTH + 1, 60)
    pieces = [
        Encoded(rng.integers(0, TINY.vocab_size, n).astype(np.int32), np.arange(n) > 1, "")
        for n in lengths
    ]
    rows = pack(pieces, LENGTH, packing=True, seed=0)
    place = NamedSharding(mesh, BATCH)
    batches = [
        global_arrays(rows, numbers.reshape(2, -1), place)
        for numbers in (np.arange(ROWS), np.arange(ROWS) + 3)
    ]
    state, program = assemble(config, weights, mesh, steps=10)
    found: dict[str, Any] = {}
    for number, batch in enumerate(batches):
        state, result = program.step(state, weights.frozen, batch, True)
        found[f"grad_norm_{number}"] = result.grad_norm
        found[f"lm_{number}"] = result.terms.lm.loss
        found[f"kl_{number}"] = result.terms.kl
        found[f"head_{number}"] = jnp.stack([head.loss for head in result.terms.heads.heads])
    found |= flat(state.trainable)
    if mode == "medusa1" and sizes[0] == count > 1:
        compiled = program.step.lower(state, weights.frozen, batches[0], True).compile()
        assert_matrices_are_summed_once_a_piece(Program.of(compiled))
    if count > 1:
        split_ways = {
            leaf.sharding.shard_shape(leaf.shape) != leaf.shape
            for leaf in jax.tree.leaves((state.trainable, state.opt_state))
            if leaf.ndim > 1
        }
        assert sizes[0] == count or True in split_ways  # something really is split
    return {
        name: np.asarray(
            array
            if array.is_fully_addressable
            else multihost_utils.process_allgather(array, tiled=True)
        )
        for name, array in found.items()
    }


def assert_matrices_are_summed_once_a_piece(program: Program) -> None:
    """The loop over pieces sums gradients over devices, and the loop over chunks in it does not."""

    def sums(computation: str, depth: int) -> Iterator[int]:
        for one in program.computations[computation]:
            over_devices = one.opcode.startswith(("all-reduce", "reduce-scatter"))
            if over_devices and any(len(array.dims) > 1 for array in one.arrays):
                yield depth
            for name in one.callees:
                yield from sums(name, depth + (one.opcode == "while"))

    assert set(sums(program.entry, 0)) == {1}


if __name__ == "__main__":
    out, *runs = sys.argv[1:]
    start_processes()
    for one in runs:
        mode, _, mesh = one.partition(":")
        found = run(mode, tuple(map(int, mesh.split(","))))
        if jax.process_index() == 0:
            np.savez(f"{out}-{one}.npz", **found)
