"""Step after step, with evaluations, checkpoints and reports between them."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from medusa_jax.data.loader import Batches, global_arrays, in_order
from medusa_jax.data.packing import Rows
from medusa_jax.training.checkpoints import CheckpointError, Checkpoints
from medusa_jax.training.metrics import Metrics
from medusa_jax.training.objective import Params, Terms, report
from medusa_jax.training.optimizer import learning_rate
from medusa_jax.training.settings import Config
from medusa_jax.training.setup import Program
from medusa_jax.training.step import StepResult, TrainState


class Diverged(RuntimeError):
    """The loss or its gradient is no number any more."""


class Interrupted(RuntimeError):
    """The run was asked to stop (SIGTERM), saved, and can be resumed."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """The steps of a run, and what is done between them.

    Attributes:
      config: of the run.
      frozen: parameters that do not learn.
      program: what is minimised, and the compiled functions.
      batches, eval_rows: what is learnt from, and what is not.
      total: steps of the whole run.
      checkpoints, metrics: where it writes.
    """

    config: Config
    frozen: Params
    program: Program
    batches: Batches
    eval_rows: Rows
    total: int
    checkpoints: Checkpoints
    metrics: Metrics

    def run(self, state: TrainState) -> TrainState:
        """Steps from where the state stands to the last.

        Raises:
          Diverged, Interrupted, CheckpointError: the message says where the run stands.
          RuntimeError: a file could not be written, for example on a full disk.
        """
        try:
            return self._steps(state)
        except OSError as error:
            raise RuntimeError(
                f"{self.checkpoints.directory.parent}: {error}; the last good checkpoint: "
                f"{self.checkpoints.last_good}"
            ) from error

    def _steps(self, state: TrainState) -> TrainState:
        """Reports each step after the next has been dispatched.

        So the host never waits for the device before it has given it the next step, and
        builds the next batch while the device computes.
        """
        run = self.config.run
        stop = _Stop()
        behind: tuple[int, StepResult] | None = None
        clock = _Clock(self.config.optim.batch_size * self.config.data.sequence_length)
        if int(state.step) == 0:
            self._evaluate(0, state)
        for number in range(int(state.step) + 1, self.total + 1):
            batch = self.batches(number - 1)
            state, result = self.program.step(state, self.frozen, batch)
            if behind is not None:
                self._report(*behind, clock)
            behind = number, result
            last, stopping = number == self.total, stop(number)
            if last or stopping or _due(number, run.save_every) or _due(number, run.eval_every):
                self._report(*behind, clock)  # also makes sure that what is saved is sound
                behind = None
                with clock.paused():
                    if last or _due(number, run.eval_every):
                        self._evaluate(number, state)
                    if last or stopping or _due(number, run.save_every):
                        self.checkpoints.save(state)
            if stopping and not last:
                self.checkpoints.wait()
                raise Interrupted(f"stopped by a signal; step {number} is saved and can be resumed")
        self.checkpoints.save(state)
        self.checkpoints.wait()
        return state

    def _report(self, number: int, result: StepResult, clock: "_Clock") -> None:
        heads_weight, norm = float(result.heads_weight), float(result.grad_norm)
        values = report(result.terms, heads_weight, self.program.objective)
        rate = clock.tick()
        if not (math.isfinite(values["loss"]) and math.isfinite(norm)):
            with contextlib.suppress(CheckpointError):
                self.checkpoints.wait()
            raise Diverged(
                f"step {number}: loss {values['loss']}, gradient norm {norm}; stopped. "
                f"The last good checkpoint: {self.checkpoints.last_good}"
            )
        self.metrics.advance(rate, values["loss"])
        if number == self.total or number == 1 or _due(number, self.config.run.log_every):
            rate_at: Any = learning_rate(self.config.optim, self.total)
            values |= {"grad_norm": norm, "learning_rate": float(rate_at(number - 1))}
            if self.config.mode == "medusa2":
                values["heads_weight"] = heads_weight
            values["epoch"] = number / self.batches.steps_per_epoch
            self.metrics.write(number, values | {"tokens_per_second": rate})
            clock.restart()

    def _evaluate(self, number: int, state: TrainState) -> None:
        every = [
            self.program.evaluate(state.trainable, self.frozen, batch)
            for batch in self._eval_batches()
        ]
        total: Terms = jax.tree.map(lambda *terms: sum(terms), *every)
        values = report(total, self.config.loss.heads_weight, self.program.objective)
        values["perplexity"] = math.exp(min(values["lm_loss"], 700.0))
        self.metrics.write(number, {f"eval_{name}": value for name, value in values.items()})
        tops = ", ".join(f"{top:.3f}" for top in values.get("head_top1", ()))
        self.metrics.say(
            f"step {number}: held-out loss {values['loss']:.4f}, perplexity "
            f"{values['perplexity']:.4f}" + (f", heads' top-1 {tops}" if tops else "")
        )

    def _eval_batches(self) -> Iterator[dict[str, jax.Array]]:
        size = self.config.optim.batch_size // self.config.optim.accumulation
        place = self.batches.sharding
        for numbers in in_order(self.eval_rows, size, self.config.data.eval_rows):
            yield global_arrays(self.eval_rows, numbers, place)


class _Clock:
    """Tokens per second, padding included, since the last logged line; pauses do not count."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self.restart()

    def restart(self) -> None:
        """Begins a new average."""
        self._start, self._steps, self._paused = time.perf_counter(), 0, 0.0

    def tick(self) -> float:
        """One more step is done; the average so far."""
        self._steps += 1
        return self._tokens * self._steps / (time.perf_counter() - self._start - self._paused)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time within does not count."""
        begun = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begun


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


class _Stop:
    """Whether SIGTERM has asked the run to stop; all processes agree after which step.

    With several processes JAX itself listens for the signal, and settles the step.
    """

    def __init__(self) -> None:
        self._asked = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def __call__(self, number: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(number)
        return self._asked
