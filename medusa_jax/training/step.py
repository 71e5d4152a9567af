"""What a training step advances, and the step: gradients of one batch, one update."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from medusa_jax.training.objective import Batch, Objective, Params, Terms
from medusa_jax.training.settings import Loss


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


@dataclasses.dataclass(frozen=True)
class Ramp:
    """lambda_0 over the steps of a run.

    Attributes:
      weight: its final value.
      kind: `constant`, `linear`, or `sine`: a quarter wave from 0 to `weight`.
      steps: steps after which it is reached.
    """

    weight: float
    kind: str
    steps: int

    @classmethod
    def of(cls, loss: Loss, total_steps: int) -> "Ramp":
        """The ramp of a run."""
        return cls(loss.heads_weight, loss.ramp, max(int(loss.ramp_fraction * total_steps), 1))

    def __call__(self, step: Array) -> Array:
        """lambda_0 at a step, from 0."""
        done = jnp.minimum(step / self.steps, 1.0)
        if self.kind == "constant":
            return jnp.asarray(self.weight, jnp.float32)
        return self.weight * (done if self.kind == "linear" else jnp.sin(math.pi / 2 * done))


def init_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ramp: Ramp,
    seed: int,
    shardings: Any = None,
) -> Any:
    """The compiled step (state, frozen, batch [A, B, T]) -> (state, StepResult).

    Only `trainable` is differentiated: nothing is computed or kept for the
    gradient of what is frozen. The state is donated.

    Args:
      shardings: of the state and of the result; None leaves them to the compiler.
    """
    step = functools.partial(_step, objective, optimizer, ramp, seed)
    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def _step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ramp: Ramp,
    seed: int,
    state: TrainState,
    frozen: Params,
    batch: Batch,
) -> tuple[TrainState, StepResult]:
    counts, heads_weight = objective.counts(batch), ramp(state.step)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    pieces = batch["tokens"].shape[0]
    loss = jax.value_and_grad(objective.loss, has_aux=True)

    def piece(number: Array | int) -> tuple[Params, Terms]:
        part = jax.tree.map(lambda array: array[number], batch)
        noise = jax.random.fold_in(key, number)
        # Tied to the piece, so that weights split over devices are put together layer by
        # layer in every piece: before the loop, all of them would have to lie there whole.
        learns, fixed, part = jax.lax.optimization_barrier((state.trainable, frozen, part))
        (_, terms), grads = loss(learns, fixed, part, counts, heads_weight, noise)
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
    result = StepResult(terms, optax.tree.norm(grads), heads_weight)
    return TrainState(state.step + 1, trainable, opt_state), result


def make_evaluation(objective: Objective, sharding: Any = None) -> Any:
    """The compiled (trainable, frozen, batch [1, B, T]) -> Terms, without dropout."""

    def evaluate(trainable: Params, frozen: Params, batch: Batch) -> Terms:
        return objective.terms(trainable, frozen, jax.tree.map(lambda a: a[0], batch))

    return jax.jit(evaluate, out_shardings=sharding)
