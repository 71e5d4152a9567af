"""What a run computes, put together once: its starting state and its compiled functions."""

import dataclasses
import functools
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medusa_jax.distributed.rules import abstract
from medusa_jax.training.mesh import HIDDEN, compiler_options
from medusa_jax.training.objective import Objective
from medusa_jax.training.optimizer import heads_weight, optimizer
from medusa_jax.training.settings import Config
from medusa_jax.training.step import TrainState, init_state, make_evaluation, make_step
from medusa_jax.training.weights import Weights


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run on its mesh.

    Attributes:
      objective: what is minimised.
      step: `step.make_step`.
      evaluate: `step.make_evaluation`.
    """

    objective: Objective
    step: Any
    evaluate: Any


def assemble(
    config: Config, weights: Weights, mesh: Mesh, steps: int, *, donate: bool = True
) -> tuple[TrainState, Program]:
    """The state before the first step (`starting_state`), and what advances it.

    Args:
      steps: of the whole run; schedules depend on it.
    """
    rule = optimizer(config, steps)
    state, places = starting_state(weights, rule, mesh, donate=donate)
    hidden = NamedSharding(mesh, HIDDEN)
    objective = Objective.of(config, weights.model, weights.heads, hidden)
    everywhere = NamedSharding(mesh, PartitionSpec())
    weight = heads_weight(config.loss, steps)
    options = compiler_options(mesh)
    step = make_step(objective, rule, weight, config.seed, (places, everywhere), options)
    return state, Program(objective, step, make_evaluation(objective, everywhere, options))


def starting_state(
    weights: Weights, rule: optax.GradientTransformation, mesh: Mesh, *, donate: bool
) -> tuple[TrainState, Any]:
    """The state before the first step, and its shardings.

    With `donate` off, of weights that are shapes only, it is shapes only.
    """
    make = functools.partial(init_state, optimizer=rule)
    shape = abstract(jax.eval_shape(make, weights.trainable), mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, shape)
    if not donate:
        return shape, places
    return jax.jit(make, donate_argnums=0, out_shardings=places)(weights.trainable), places
