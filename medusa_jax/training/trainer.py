"""A run from data to exported weights. Read top to bottom; each stage is a module."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding

from medusa_jax import json_files
from medusa_jax.data.loader import Batches
from medusa_jax.data.packing import Rows
from medusa_jax.distributed.rules import start_processes
from medusa_jax.errors import InputError
from medusa_jax.files import writing
from medusa_jax.interrupts import unwinding
from medusa_jax.model.config import ModelConfig
from medusa_jax.training import export, settings, workdir
from medusa_jax.training.checkpoints import Checkpoints
from medusa_jax.training.dataset import read_rows
from medusa_jax.training.divergence import Divergence
from medusa_jax.training.hidden_states import with_hidden_states
from medusa_jax.training.loop import Loop
from medusa_jax.training.mesh import BATCH, check_batch, make_mesh
from medusa_jax.training.metrics import Metrics, read_lines
from medusa_jax.training.settings import Config
from medusa_jax.training.setup import assemble
from medusa_jax.training.weights import check_heads, load, model_shape, starting_token_map
from medusa_jax.training.workdir import CONFIG, DATA


def train(config: Config, directory: str | Path) -> None:
    """Runs, or resumes, a training in a working directory.

    Args:
      directory: a local one, or an address such as gs://bucket/run.

    Raises:
      InputError: settings, data or model are wrong, or the directory holds a run of others.
      Diverged, Interrupted, CheckpointError: the run stopped; the message says where it stands.
    """
    # --- 1. Settings, processes, mesh -------------------------------------------------------
    config = settings.from_dict(json.loads(json.dumps(dataclasses.asdict(config))))
    settings.check(config)
    place = workdir.open_workdir(directory)
    export.destination(config, place)
    start_processes()
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.optim)
    with workdir.claimed(place):
        workdir.check_shared(place)
        workdir.check_settings(place, config)
        check_length(config, model_shape(config))
        _run(config, place, mesh)


def _run(config: Config, place: Path, mesh: Mesh) -> None:
    """A run whose working directory is this process's own."""
    # --- 2. What an earlier process has left ------------------------------------------------
    first = jax.process_index() == 0
    checkpoints = Checkpoints(place, config.run.keep)
    done = checkpoints.latest
    check_heads(config, start=done is None)
    records = read_lines(place, done or 0)
    token_map = None if done is None else workdir.read_data(place).integers("token_map")

    # --- 3. Data ----------------------------------------------------------------------------
    train_rows, eval_rows = read_rows(config, first)
    sharding, optim = NamedSharding(mesh, BATCH), config.optim
    batches = Batches(train_rows, optim.batch_size, optim.accumulation, config.seed, sharding)
    total = optim.steps or math.ceil(optim.epochs * batches.steps_per_epoch)
    if token_map is None:
        token_map = choose_token_map(config, train_rows)
    else:
        workdir.check_data(place, train_rows)
    if config.data.hidden_states:  # takes long, so what can be refused has been
        train_rows, eval_rows = with_hidden_states(config, mesh, train_rows, eval_rows)
        batches = dataclasses.replace(batches, rows=train_rows)

    # --- 4. Weights, compiled functions, checkpoint -----------------------------------------
    weights = load(config, mesh, token_map, with_learnt=done is None)
    state, program = assemble(config, weights, mesh, total, donate=done is None)
    if done is not None:
        state = checkpoints.restore(state, done)

    # --- 5. Records -------------------------------------------------------------------------
    if first:
        json_files.write(place / CONFIG, dataclasses.asdict(config))
        data = {"fingerprint": train_rows.fingerprint()}
        json_files.write(place / DATA, data | ({"token_map": token_map} if token_map else {}))
    metrics = Metrics(place, records, done or 0, total, config.run.tensorboard, active=first)
    if done is not None:
        metrics.say(f"resuming at step {done} of {total}")

    # --- 6. Steps ---------------------------------------------------------------------------
    divergence = Divergence.of(config.run.patience, weights.model.vocab_size)
    for record in records[:1]:
        divergence.began(record.get("eval_loss", 0.0))
    loop = Loop(
        config, weights.frozen, program, batches, eval_rows, total, checkpoints, metrics, divergence
    )
    with contextlib.closing(checkpoints), metrics:
        state = loop.run(state)

    # --- 7. Export --------------------------------------------------------------------------
    trained = weights.with_trained(state.trainable)
    with unwinding(), writing(place), workdir.local_copy(place, write=first) as target:
        made = export.export(config, trained, target, write=first)
    metrics.say(f"wrote {place / made.name}")


def choose_token_map(config: Config, rows: Rows) -> Sequence[int]:
    """The tokens that truncated heads guess among; none where they are not.

    Those of the heads to start from, if they are truncated, else the most frequent of the
    training data.
    """
    if not config.heads.truncated:
        return []
    if config.heads.path and (started := starting_token_map(config)):
        return started
    return rows.most_frequent(config.heads.truncated)


def check_length(config: Config, model: ModelConfig) -> None:
    """Raises InputError where rows are longer than the model's context."""
    if config.data.sequence_length > model.context:
        raise InputError(
            f"data.sequence_length {config.data.sequence_length} exceeds the model's context of "
            f"{model.context} tokens"
        )
