"""A run from data to exported weights. Read top to bottom; each stage is a module."""

import dataclasses
import json
import math
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from medusa_jax.checkpoints.tensors import read_json, write_json
from medusa_jax.data.loader import Batches
from medusa_jax.data.packing import Rows
from medusa_jax.distributed.rules import start_processes
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig
from medusa_jax.training import export, settings
from medusa_jax.training.checkpoints import Checkpoints
from medusa_jax.training.dataset import read_rows
from medusa_jax.training.loop import Loop
from medusa_jax.training.mesh import BATCH, check_batch, make_mesh
from medusa_jax.training.metrics import Metrics
from medusa_jax.training.settings import Config
from medusa_jax.training.setup import assemble
from medusa_jax.training.weights import load, model_shape, starting_token_map

# In the working directory: the settings as they are run, and which data they found.
CONFIG, DATA = "config.json", "data.json"


def train(config: Config, workdir: str | Path) -> None:
    """Runs, or resumes, a training in `workdir`.

    Raises:
      InputError: settings, data or model are wrong, or `workdir` holds a run of other settings.
      Diverged, Interrupted, CheckpointError: the run stopped; the message says where it stands.
    """
    if "://" in str(workdir):
        raise InputError(
            f"--workdir {workdir}: expected a directory, not an address; mount the bucket, or use "
            "a shared file system (docs/launch.md)"
        )
    workdir = Path(workdir)
    config = settings.from_dict(json.loads(json.dumps(dataclasses.asdict(config))))
    settings.check(config)
    export.destination(config, workdir)
    start_processes()
    first = jax.process_index() == 0
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.optim)
    check_shared(workdir)
    check_directory(workdir, config)

    check_length(config, model_shape(config))
    train_rows, eval_rows = read_rows(config, first)
    batches = Batches(
        train_rows,
        config.optim.batch_size,
        config.optim.accumulation,
        config.seed,
        NamedSharding(mesh, BATCH),
    )
    total = config.optim.steps or math.ceil(config.optim.epochs * batches.steps_per_epoch)

    checkpoints = Checkpoints(workdir, config.run.keep)
    resumed = checkpoints.latest is not None
    if resumed:
        check_data(workdir, train_rows)
    token_map = token_map_of(config, train_rows, workdir if resumed else None)
    weights = load(config, mesh, token_map, with_learnt=not resumed)
    state, program = assemble(config, weights, mesh, total, donate=not resumed)
    if resumed:
        state = checkpoints.restore(state)
    if first:
        write_json(workdir / CONFIG, dataclasses.asdict(config))
        found = {"fingerprint": train_rows.fingerprint()}
        write_json(workdir / DATA, found | ({"token_map": token_map} if token_map else {}))
    start = int(state.step)
    metrics = Metrics(workdir, start, total, tensorboard=config.run.tensorboard, active=first)
    if start:
        metrics.say(f"resuming at step {start} of {total}")
    loop = Loop(
        config=config,
        frozen=weights.frozen,
        program=program,
        batches=batches,
        eval_rows=eval_rows,
        total=total,
        checkpoints=checkpoints,
        metrics=metrics,
    )
    try:
        state = loop.run(state)
    except OSError as error:
        raise RuntimeError(
            f"{workdir}: {error}; the last good checkpoint: {checkpoints.last_good}"
        ) from error
    finally:
        metrics.close()
        checkpoints.close()
    weights = weights.with_trained(state.trainable)
    metrics.say(f"wrote {export.export(config, weights, workdir, write=first)}")


def token_map_of(config: Config, rows: Rows, workdir: Path | None) -> list[int]:
    """The tokens that truncated heads guess among; none where they are not.

    Those of the run that `workdir` holds, else of the heads to start from, if they are
    truncated, else the most frequent of the training data.
    """
    if not config.heads.truncated:
        return []
    if workdir is not None:
        return read_json(workdir / DATA)["token_map"]
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


def check_shared(workdir: Path) -> None:
    """Raises InputError, in every process, unless they all see one working directory."""
    if jax.process_count() == 1:
        return
    now = np.array(time.time_ns() % 2**31, np.int32)
    mark = workdir / f".shared-{multihost_utils.broadcast_one_to_all(now)}"
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        mark.touch()
    multihost_utils.sync_global_devices("marked")
    seen = multihost_utils.process_allgather(np.array(mark.is_file()))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        raise InputError(
            f"--workdir {workdir}: processes {np.flatnonzero(~seen).tolist()} of {len(seen)} do "
            "not see what process 0 writes there; give a directory that all machines share"
        )


def check_directory(workdir: Path, config: Config) -> None:
    """Refuses a directory that holds another run.

    Mesh and `run` may differ: they change how, not what.

    Raises:
      InputError: shows the differences.
    """
    file = workdir / CONFIG
    if not file.is_file():
        if any(workdir.glob("checkpoints/*")):
            raise InputError(f"{workdir} holds checkpoints, but no {CONFIG} to say of which run")
        return
    theirs = dataclasses.asdict(settings.from_dict(read_json(file)))
    lines = [
        line
        for line in settings.difference(theirs, dataclasses.asdict(config))
        if not line.startswith(("mesh.", "run."))
    ]
    if lines:
        raise InputError(
            f"{workdir} holds a run of other settings (there -> now); give another --workdir "
            "or the settings of that run:\n  " + "\n  ".join(lines)
        )


def check_data(workdir: Path, rows: Rows) -> None:
    """Raises InputError unless the rows are those that the run in `workdir` began with."""
    if read_json(workdir / DATA).get("fingerprint") != rows.fingerprint():
        raise InputError(
            f"{workdir}: the training data has changed since this run began, so it cannot be "
            "resumed exactly; restore the data, or give another --workdir"
        )
