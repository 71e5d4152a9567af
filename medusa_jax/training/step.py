"""What a training step advances, and the step: gradients of one batch, one update."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from medusa_jax.training.objective import Batch, Objective, Params, Terms


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step; a checkpoint is this and nothing else.

    Random numbers are a function of (seed, step), so none are kept.

    Attributes:
      step: updates made, int32 [].
      trainable: nested parameters that learn, float32.
      opt_state: of the optimizer.
    """

    step: Array
    trainable: Params
    opt_state: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step reports.

    Attributes:
      terms: sums over its batch.
      grad_norm: before clipping [].
      heads_weight: lambda_0 at this step [].
    """

    terms: Terms
    grad_norm: Array
    heads_weight: Array


def init_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    heads_weight: optax.Schedule,
    seed: int,
    shardings: Any = None,
    options: dict[str, str] | None = None,
) -> Any:
    """The compiled step (state, frozen, batch [A, B, T], with_lm) -> (state, StepResult).

    Only `trainable` is differentiated: nothing is computed or kept for the
    gradient of what is frozen. The state is donated. `with_lm` (bool []) is that of
    `Objective.terms`, and does not change what is learnt.

    Args:
      heads_weight: lambda_0 by step.
      shardings: of the state and of the result; None leaves them to the compiler.
      options: of the compiler.
    """
    step = functools.partial(_step, objective, optimizer, heads_weight, seed)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=options)


def _step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    heads_weight: optax.Schedule,
    seed: int,
    state: TrainState,
    frozen: Params,
    batch: Batch,
    with_lm: Array | bool,
) -> tuple[TrainState, StepResult]:
    counts = objective.counts(batch)
    weight = jnp.asarray(heads_weight(state.step), jnp.float32)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    pieces = batch["tokens"].shape[0]
    loss = jax.value_and_grad(objective.loss, has_aux=True)

    def piece(number: Array | int) -> tuple[Params, Terms]:
        part = jax.tree.map(lambda array: array[number], batch)
        noise = jax.random.fold_in(key, number)
        # Tied to the piece, so that weights split over devices are put together layer by
        # layer in every piece: before the loop, all of them would have to lie there whole.
        learns, fixed, part = jax.lax.optimization_barrier((state.trainable, frozen, part))
        (_, terms), grads = loss(learns, fixed, part, counts, weight, noise, with_lm)
        return grads, terms

    if pieces == 1:
        grads, terms = piece(0)
    else:
        shapes = jax.eval_shape(piece, 0)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(total: Any, number: Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, piece(number)), None

        (grads, terms), _ = jax.lax.scan(add, zeros, jnp.arange(pieces))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable: Any = optax.apply_updates(state.trainable, updates)
    result = StepResult(terms, optax.tree.norm(grads), weight)
    return TrainState(state.step + 1, trainable, opt_state), result


def make_evaluation(
    objective: Objective, sharding: Any = None, options: dict[str, str] | None = None
) -> Any:
    """The compiled (trainable, frozen, batch [1, B, T]) -> Terms, without dropout."""

    def evaluate(trainable: Params, frozen: Params, batch: Batch) -> Terms:
        return objective.terms(trainable, frozen, jax.tree.map(lambda a: a[0], batch))

    return jax.jit(evaluate, out_shardings=sharding, compiler_options=options)
