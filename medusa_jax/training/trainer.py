"""A run from data to exported weights. Read top to bottom; each stage is a module."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from medusa_jax import hf
from medusa_jax.config import ModelConfig
from medusa_jax.errors import InputError
from medusa_jax.text import Text
from medusa_jax.training import export, settings, sharding
from medusa_jax.training.batches import Batches, global_arrays, in_order
from medusa_jax.training.checkpoints import Checkpoints
from medusa_jax.training.corpus import Corpus
from medusa_jax.training.encoding import Encoded, encode
from medusa_jax.training.metrics import Metrics
from medusa_jax.training.objective import Objective, Params, Terms, report
from medusa_jax.training.optimizer import learning_rate, optimizer
from medusa_jax.training.packing import Rows, fit, pack
from medusa_jax.training.settings import Config
from medusa_jax.training.state import (
    Ramp,
    StepResult,
    TrainState,
    init_state,
    make_evaluation,
    make_step,
)
from medusa_jax.training.weights import Weights, load, model_shape

log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """The loss or its gradient is no number any more."""


class Interrupted(RuntimeError):
    """The run was asked to stop (SIGTERM), saved, and can be resumed."""


def train(config: Config, workdir: str | Path) -> None:
    """Runs, or resumes, a training in `workdir`.

    Raises:
      InputError: settings, data or model are wrong, or `workdir` holds a run of other settings.
      Diverged, Interrupted, CheckpointError: the run stopped; the message says where it stands.
    """
    workdir = Path(workdir)
    settings.check(config)
    sharding.start_processes()
    first = jax.process_index() == 0
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.optim)
    claim(workdir, config, write=first)

    model = model_shape(config)
    check_length(config, model)
    train_rows, eval_rows = read_rows(config, first)
    batches = Batches(
        train_rows,
        config.optim.batch_size,
        config.optim.accumulation,
        config.seed,
        NamedSharding(mesh, sharding.BATCH),
    )
    total = config.optim.steps or math.ceil(config.optim.epochs * batches.steps_per_epoch)

    checkpoints = Checkpoints(workdir, config.run.keep)
    resumed = checkpoints.latest is not None
    weights = load(config, mesh, resumed=resumed)
    rule = optimizer(config, total)
    state, places = starting_state(weights, rule, mesh, donate=not resumed)
    if resumed:
        state = checkpoints.restore(state)
    start = int(state.step)
    metrics = Metrics(workdir, start, total, tensorboard=config.run.tensorboard, active=first)
    if start:
        metrics.say(f"resuming at step {start} of {total}")
    objective = Objective.of(config, model, weights.heads, NamedSharding(mesh, sharding.HIDDEN))
    ramp = Ramp.of(config.loss, total)
    step = make_step(objective, rule, ramp, config.seed, places)
    run = _Run(
        config=config,
        frozen=weights.frozen,
        objective=objective,
        step=step,
        evaluate=make_evaluation(objective),
        batches=batches,
        eval_rows=eval_rows,
        total=total,
        checkpoints=checkpoints,
        metrics=metrics,
    )
    try:
        state = run.until_the_end(state)
    finally:
        metrics.close()
        checkpoints.close()
    weights = weights.with_trained(state.trainable)
    for path in export.export(config, weights, workdir, write=first):
        metrics.say(f"wrote {path}")


def starting_state(
    weights: Weights, rule: optax.GradientTransformation, mesh: Mesh, *, donate: bool
) -> tuple[TrainState, Any]:
    """The state before the first step, and its shardings.

    With `donate` off, of weights that are shapes only, it is shapes only.
    """
    make = functools.partial(init_state, optimizer=rule)
    shape = sharding.abstract(jax.eval_shape(make, weights.trainable), mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, shape)
    if not donate:
        return shape, places
    return jax.jit(make, donate_argnums=0, out_shardings=places)(weights.trainable), places


def check_length(config: Config, model: ModelConfig) -> None:
    """Raises InputError where rows are longer than the model's context."""
    if config.data.sequence_length > model.context:
        raise InputError(
            f"data.sequence_length {config.data.sequence_length} exceeds the model's context of "
            f"{model.context} tokens"
        )


def claim(workdir: Path, config: Config, *, write: bool) -> None:
    """Writes `config.json`, or checks that the one there is of the same run.

    Mesh and `run` may differ: they change how, not what.

    Raises:
      InputError: it is of another run; shows the differences.
    """
    file, ours = workdir / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if file.is_file():
        theirs = json.loads(file.read_text(encoding="utf-8"))
        lines = [
            line
            for line in settings.difference(theirs, ours)
            if not line.startswith(("mesh.", "run."))
        ]
        if lines:
            raise InputError(
                f"{workdir} holds a run of other settings (there -> now); give another --workdir "
                "or the settings of that run:\n  " + "\n  ".join(lines)
            )
    if write:
        workdir.mkdir(parents=True, exist_ok=True)
        whole = file.with_suffix(".tmp")
        whole.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        os.replace(whole, file)


def read_rows(config: Config, say: bool) -> tuple[Rows, Rows]:
    """Training and held-out rows.

    Raises:
      InputError: no data, or none of it can be learnt from.
    """
    data = config.data
    if not data.train:
        raise InputError("data.train names no file and no hub dataset")
    text = Text(hf.resolve(config.model.path), template=data.template or None)

    def encoded(sources: tuple[str, ...]) -> list[Encoded]:
        corpus = Corpus(
            sources,
            separator=data.separator,
            max_documents=data.max_documents,
            on_bad=data.on_bad,
        )
        documents = list(encode(corpus, text, data.end))
        if corpus.skipped and say:
            log.warning(
                "%d of %d records were left out; the first: %s",
                len(corpus.skipped),
                len(corpus.skipped) + len(documents),
                corpus.skipped[0],
            )
        return documents

    train = encoded(data.train)
    if data.eval:
        held_out = encoded(data.eval)
    else:
        order = np.random.default_rng(config.seed).permutation(len(train))
        count = min(math.ceil(data.eval_fraction * len(train)), len(train) - 1)
        held_out = [train[i] for i in order[:count]]
        train = [train[i] for i in order[count:]]

    def rows(documents: list[Encoded], sources: tuple[str, ...]) -> Rows:
        pieces = fit(documents, data.sequence_length, ", ".join(sources))
        return pack(pieces, data.sequence_length, packing=data.packing, seed=config.seed)

    return rows(train, data.train), rows(held_out, data.eval or data.train)


@dataclasses.dataclass(frozen=True)
class _Run:
    config: Config
    frozen: Params
    objective: Objective
    step: Any
    evaluate: Any
    batches: Batches
    eval_rows: Rows
    total: int
    checkpoints: Checkpoints
    metrics: Metrics

    def until_the_end(self, state: TrainState) -> TrainState:
        """Steps from where the state stands to the last, reporting each a step late.

        So the host never waits for the device before it has given it the next step.
        """
        run = self.config.run
        stop = _stop_flag()
        behind: tuple[int, StepResult] | None = None
        clock = _Clock(self.config.optim.batch_size * self.config.data.sequence_length)
        if int(state.step) == 0:
            self._evaluate(0, state)
        for number in range(int(state.step) + 1, self.total + 1):
            batch = self.batches(number - 1)
            state, result = self.step(state, self.frozen, batch)
            if behind is not None:
                self._report(*behind, clock)
            behind = number, result
            last = number == self.total
            if last or stop or _due(number, run.save_every) or _due(number, run.eval_every):
                self._report(*behind, clock)  # also makes sure that what is saved is sound
                behind = None
                with clock.paused():
                    if last or _due(number, run.eval_every):
                        self._evaluate(number, state)
                    if last or stop or _due(number, run.save_every):
                        self.checkpoints.save(state)
            if stop and not last:
                self.checkpoints.wait()
                raise Interrupted(f"stopped by a signal; step {number} is saved and can be resumed")
        self.checkpoints.save(state)
        self.checkpoints.wait()
        return state

    def _report(self, number: int, result: StepResult, clock: "_Clock") -> None:
        heads_weight, norm = float(result.heads_weight), float(result.grad_norm)
        values = report(result.terms, heads_weight, self.objective)
        rate = clock.tick()
        if not (math.isfinite(values["loss"]) and math.isfinite(norm)):
            self.checkpoints.wait()
            last = self.checkpoints.latest
            where = f"step {last} in {self.checkpoints.directory}" if last else "there is none yet"
            raise Diverged(
                f"step {number}: loss {values['loss']}, gradient norm {norm}; stopped. "
                f"The last good checkpoint: {where}"
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
            self.evaluate(state.trainable, self.frozen, batch) for batch in self._eval_batches()
        ]
        total: Terms = jax.tree.map(lambda *terms: sum(terms), *every)
        values = report(total, self.config.loss.heads_weight, self.objective)
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
    """Tokens per second since the last logged line, evaluation and saving left out."""

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


def _stop_flag() -> list[bool]:
    """A list that is filled, and so true, once SIGTERM arrives."""
    asked: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    return asked
