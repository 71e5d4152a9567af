"""Step after step, with evaluations, checkpoints and reports between them."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from medusa_jax.data.loader import Batches, global_arrays, in_order
from medusa_jax.data.packing import Rows
from medusa_jax.distributed import partners
from medusa_jax.files import OutputError
from medusa_jax.interrupts import Stop
from medusa_jax.training.checkpoints import CheckpointError, Checkpoints
from medusa_jax.training.clock import Clock
from medusa_jax.training.divergence import Diverged, Divergence
from medusa_jax.training.heads_objective import EAL
from medusa_jax.training.metrics import Metrics
from medusa_jax.training.objective import Params, Terms, report
from medusa_jax.training.optimizer import learning_rate
from medusa_jax.training.settings import Config
from medusa_jax.training.setup import Program
from medusa_jax.training.step import StepResult, TrainState


class Interrupted(RuntimeError):
    """The run was asked to stop by SIGTERM; what is saved can be resumed."""


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
      divergence: what ends it before its last step.
    """

    config: Config
    frozen: Params
    program: Program
    batches: Batches
    eval_rows: Rows
    total: int
    checkpoints: Checkpoints
    metrics: Metrics
    divergence: Divergence

    def run(self, state: TrainState) -> TrainState:
        """Steps from where the state stands to the last.

        Raises:
          KeyboardInterrupt: SIGINT; the message says what is saved.
          Diverged, Interrupted, CheckpointError, OutputError: the same.
        """
        partners.advise(lambda: f"the last good checkpoint: {self.checkpoints.last_good}")
        try:
            with partners.ending_if_lost():
                return self._steps(state)
        except (Diverged, OutputError) as error:
            with contextlib.suppress(CheckpointError):
                self.checkpoints.wait()
            raise type(error)(
                f"{error}; stopped. The last good checkpoint: {self.checkpoints.last_good}"
            ) from error

    def _steps(self, state: TrainState) -> TrainState:
        """Reports each step after the next has been dispatched.

        So the host never waits for the device before it has given it the next step, and
        builds the next batch while the device computes.
        """
        run = self.config.run
        behind: tuple[int, StepResult] | None = None
        clock = Clock(self.config.optim.batch_size * self.config.data.sequence_length)
        if int(state.step) == 0:
            self.divergence.began(self._evaluate(0, state))
        with contextlib.ExitStack() as stack:
            stop: Stop | None = None
            for number in range(int(state.step) + 1, self.total + 1):
                batch = self.batches(number - 1)
                if behind is not None:
                    clock.look(behind[1].grad_norm)
                state, result = self.program.step(
                    state, self.frozen, batch, np.bool_(self._logs(number))
                )
                # Until the step is compiled there is nothing to save.
                stop = stop or stack.enter_context(Stop(hand_on=jax.process_count() > 1))
                if behind is not None:
                    self._report(*behind, clock)
                behind = number, result
                last, stopping = number == self.total, _asked(stop, number)
                evaluates = last or _due(number, run.eval_every)
                saves = last or stopping or _due(number, run.save_every)
                if evaluates or saves:
                    self._report(*behind, clock)  # also makes sure that what is saved is sound
                    behind = None
                    with clock.paused():
                        loss = self._evaluate(number, state) if evaluates else None
                        if saves and not self.divergence.above:
                            self.checkpoints.save(state, loss)
                if stopping and not last:
                    self._interrupt(stop)
        self.checkpoints.wait()
        return state

    def _interrupt(self, stop: Stop) -> None:
        self.checkpoints.wait()
        step = self.checkpoints.latest
        saved = "nothing is saved" if step is None else f"step {step} is saved and can be resumed"
        if stop.number == signal.SIGINT:
            raise KeyboardInterrupt(saved)
        raise Interrupted(f"stopped by a signal; {saved}")

    def _report(self, number: int, result: StepResult, clock: Clock) -> None:
        heads_weight, norm = float(result.heads_weight), float(result.grad_norm)
        values = report(result.terms, heads_weight, self.program.objective)
        rate = clock.tick()
        self.metrics.advance(rate, values["loss"])
        if self._logs(number):
            rate_at: Any = learning_rate(self.config.optim, self.total)
            logged = values | {"grad_norm": norm, "learning_rate": float(rate_at(number - 1))}
            if self.config.mode == "medusa2":
                logged["heads_weight"] = heads_weight
            logged["epoch"] = number / self.batches.steps_per_epoch
            self.metrics.write(number, logged | {"tokens_per_second": rate})
            clock.restart()
        self.divergence.check(number, values["loss"], norm, last=number == self.total)

    def _logs(self, number: int) -> bool:
        """Whether a step has a line in `metrics.jsonl`."""
        return number in (1, self.total) or _due(number, self.config.run.log_every)

    def _evaluate(self, number: int, state: TrainState) -> float:
        """The held-out loss, which is also reported."""
        every = [
            self.program.evaluate(state.trainable, self.frozen, batch)
            for batch in self._eval_batches()
        ]
        total: Terms = jax.tree.map(lambda *terms: sum(terms), *every)
        values = report(total, self.config.loss.heads_weight, self.program.objective)
        values["perplexity"] = math.exp(min(values["lm_loss"], 700.0))
        self.metrics.write(number, {f"eval_{name}": value for name, value in values.items()})
        tops = ", ".join(f"{top:.3f}" for top in values.get("head_top1", ()))
        chains = ", in the selector's order ".join(
            f"{values[name][0]:.3f}" for name in EAL if name in values
        )
        self.metrics.say(
            f"step {number}: held-out loss {values['loss']:.4f}, perplexity "
            f"{values['perplexity']:.4f}"
            + (f", heads' top-1 {tops}, accepted length of the chain {chains}" if tops else "")
        )
        if not math.isfinite(values["loss"]):
            raise Diverged(f"step {number}: held-out loss {values['loss']}")
        return values["loss"]

    def _eval_batches(self) -> Iterator[dict[str, jax.Array]]:
        size = self.config.optim.piece_rows
        place = self.batches.sharding
        for numbers in in_order(self.eval_rows, size, self.config.data.eval_rows):
            yield global_arrays(self.eval_rows, numbers, place)


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _asked(stop: Stop, number: int) -> bool:
    """Whether the run is to stop after this step; all processes agree on the step.

    With several processes JAX itself listens for SIGTERM, and settles the step.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(number)
    return bool(stop.number)
