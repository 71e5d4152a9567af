"""A run's working directory: a local one, or an address such as gs://bucket/run.

Addresses go through `etils.epath`, which offers pathlib's methods for them. A local
directory stays a `pathlib.Path`.
"""

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from medusa_jax import json_files
from medusa_jax.data.packing import Rows
from medusa_jax.errors import InputError
from medusa_jax.files import OutputError, locked, writing
from medusa_jax.json_files import Fields
from medusa_jax.training import settings
from medusa_jax.training.settings import Config, by_name

# The settings as they are run, and which data they were run on.
CONFIG, DATA = "config.json", "data.json"
LOCK = ".lock"  # of the process that writes


def is_address(path: Any) -> bool:
    """Whether a path or a flag names a bucket instead of a local directory."""
    return "://" in str(path)


def open_workdir(name: str | Path) -> Path:
    """The directory of that name.

    Raises:
      InputError: an address that cannot be reached; the message says what is missing.
    """
    if not is_address(name):
        return Path(name)
    try:
        path = cast(Path, epath.Path(str(name)))
        path.exists()
    except KeyError:
        raise InputError(f"--workdir {name}: expected a directory, or gs:// or s3://") from None
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--workdir {name} cannot be reached: {reason}") from None
    return path


@contextlib.contextmanager
def local_copy(target: Path, *, write: bool) -> Iterator[Path]:
    """A local directory to write; if `target` is an address, its files are uploaded at the end.

    Args:
      write: whether this process uploads.
    """
    if not is_address(target):
        yield target
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).rglob("*")) if write else ():
            if file.is_file():
                copy = target / file.relative_to(scratch)
                copy.parent.mkdir(parents=True, exist_ok=True)
                with open(file, "rb") as source, copy.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 2**24)


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Holds a working directory, which is made, for one run; an address is not held.

    Raises:
      InputError: in every process: it is no directory, cannot be written, or another run
        writes there; names that one's process and host.
    """
    problem = ""
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0 and not is_address(workdir):
            try:
                if workdir.exists() and not workdir.is_dir():
                    raise InputError(f"--workdir {workdir}: expected a directory, not a file")
                with writing(workdir):
                    workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(workdir / LOCK, f"--workdir {workdir}"))
            except (InputError, OutputError) as error:
                problem = str(error)
        if jax.process_count() > 1:
            failed = multihost_utils.broadcast_one_to_all(np.array(bool(problem)))
            problem = problem or ("process 0 cannot use its --workdir" if failed else "")
        if problem:
            raise InputError(problem)
        yield


def check_shared(workdir: Path) -> None:
    """Raises InputError, in every process, unless they all see one working directory."""
    if jax.process_count() == 1:
        return
    now = np.array(time.time_ns() % 2**31, np.int32)
    mark = workdir / f".shared-{multihost_utils.broadcast_one_to_all(now)}"
    if jax.process_index() == 0:
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


def read_settings(workdir: Path) -> Config:
    """The settings of the run in a working directory.

    Raises:
      InputError: there are none, or they are of no such run; names the file and the setting.
    """
    file = workdir / CONFIG
    return settings.from_dict(json_files.read_object(file), str(file))


def check_settings(workdir: Path, config: Config) -> None:
    """Refuses a directory that holds another run.

    Mesh, `run` and what is recomputed may differ: they change how a run computes, not what.

    Raises:
      InputError: shows the differences.
    """
    file = workdir / CONFIG
    if not file.is_file():
        if any((workdir / "checkpoints").glob("*")):
            raise InputError(f"{workdir} holds checkpoints, but no {CONFIG} to say of which run")
        return
    theirs = dataclasses.asdict(read_settings(workdir))
    lines = [
        line
        for line in difference(theirs, dataclasses.asdict(config))
        if not line.startswith(("mesh.", "run.", "model.remat", "model.kept", "model.offloaded"))
    ]
    if lines:
        raise InputError(
            f"{workdir} holds a run of other settings (there -> now); give another --workdir "
            "or the settings of that run:\n  " + "\n  ".join(lines)
        )


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `section.field: old -> new` of two configurations as nested dicts."""
    before, after = by_name(old), by_name(new)
    return [
        f"{name}: {before.get(name, '(absent)')!r} -> {after.get(name, '(absent)')!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, "(absent)") != after.get(name, "(absent)")
    ]


def read_data(workdir: Path) -> Fields:
    """What a run has written of its data.

    Raises:
      InputError: it is not there, or is no such file.
    """
    file = workdir / DATA
    fields = Fields(json_files.read_object(file), str(file))
    fields.integer("fingerprint", least=0, most=2**32 - 1)
    return fields


def check_data(workdir: Path, rows: Rows) -> None:
    """Raises InputError unless the rows are those that the run in `workdir` began with."""
    if read_data(workdir).content["fingerprint"] != rows.fingerprint():
        raise InputError(
            f"{workdir}: the training data has changed since this run began, so it cannot be "
            "resumed exactly; restore the data, or give another --workdir"
        )
