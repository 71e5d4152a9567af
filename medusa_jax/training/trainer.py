"""A run from data to exported weights. Read top to bottom; each stage is a module."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import jax
from jax.sharding import NamedSharding

from medusa_jax import json_files
from medusa_jax.data.loader import Batches
from medusa_jax.data.packing import Rows
from medusa_jax.distributed.rules import start_processes
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig
from medusa_jax.training import export, settings, workdir
from medusa_jax.training.checkpoints import Checkpoints
from medusa_jax.training.dataset import read_rows
from medusa_jax.training.loop import Loop
from medusa_jax.training.mesh import BATCH, check_batch, make_mesh
from medusa_jax.training.metrics import Metrics
from medusa_jax.training.settings import Config
from medusa_jax.training.setup import assemble
from medusa_jax.training.weights import load, model_shape, starting_token_map
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
    first = jax.process_index() == 0
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.optim)
    workdir.check_shared(place)
    workdir.check_settings(place, config)
    check_length(config, model_shape(config))

    # --- 2. Data ----------------------------------------------------------------------------
    train_rows, eval_rows = read_rows(config, first)
    sharding, optim = NamedSharding(mesh, BATCH), config.optim
    batches = Batches(train_rows, optim.batch_size, optim.accumulation, config.seed, sharding)
    total = optim.steps or math.ceil(optim.epochs * batches.steps_per_epoch)

    # --- 3. Weights, compiled functions, checkpoint -----------------------------------------
    checkpoints = Checkpoints(place, config.run.keep)
    resumed = checkpoints.latest is not None
    if resumed:
        workdir.check_data(place, train_rows)
    token_map = token_map_of(config, train_rows, place if resumed else None)
    weights = load(config, mesh, token_map, with_learnt=not resumed)
    state, program = assemble(config, weights, mesh, total, donate=not resumed)
    if resumed:
        state = checkpoints.restore(state)

    # --- 4. Records -------------------------------------------------------------------------
    if first:
        json_files.write(place / CONFIG, dataclasses.asdict(config))
        data = {"fingerprint": train_rows.fingerprint()}
        json_files.write(place / DATA, data | ({"token_map": token_map} if token_map else {}))
    start = int(state.step)
    metrics = Metrics(place, start, total, tensorboard=config.run.tensorboard, active=first)
    if start:
        metrics.say(f"resuming at step {start} of {total}")

    # --- 5. Steps ---------------------------------------------------------------------------
    loop = Loop(config, weights.frozen, program, batches, eval_rows, total, checkpoints, metrics)
    with contextlib.closing(checkpoints), contextlib.closing(metrics):
        state = loop.run(state)

    # --- 6. Export --------------------------------------------------------------------------
    with workdir.local_copy(place, write=first) as target:
        made = export.export(config, weights.with_trained(state.trainable), target, write=first)
    metrics.say(f"wrote {place / made.name}")


def token_map_of(config: Config, rows: Rows, workdir: Path | None) -> list[int]:
    """The tokens that truncated heads guess among; none where they are not.

    Those of the run that `workdir` holds, else of the heads to start from, if they are
    truncated, else the most frequent of the training data.
    """
    if not config.heads.truncated:
        return []
    if workdir is not None:
        return json_files.read_object(workdir / DATA)["token_map"]
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
