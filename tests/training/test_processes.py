"""Runs over several processes, and runs in a bucket."""

import re
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.runs import launch, lines, train, wait_for_checkpoint
from safetensors.numpy import load_file

from medusa_jax.distributed import partners
from medusa_jax.training import checkpoints, workdir
from medusa_jax.training.checkpoints import Checkpoints


def pair(place: Path, *workdirs: Path, flags: Sequence[str] = ()) -> list[subprocess.Popen]:
    """One run split over two processes, with one working directory or, wrongly, two."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        launch(place, workdir, "--config.mesh.fsdp=2", *flags, JAX_PROCESS_ID=str(i), **names)
        for i, workdir in enumerate((*workdirs, *workdirs)[:2])
    ]


def ended(processes: list[subprocess.Popen], code: int) -> list[str]:
    """What both said on stderr, once both have ended with that exit code."""
    errors = [process.communicate(timeout=250)[1] for process in processes]
    assert [process.returncode for process in processes] == [code, code], errors
    return errors


@pytest.mark.e2e
@pytest.mark.slow
def test_two_processes_train_as_one(place: Path, finished: Path, tmp_path: Path):
    """A run split over two processes, stopped by a SIGTERM to one of them, and resumed.

    Both stop after the same step, nothing is lost, and the whole is what one process gives.
    """
    stopped = tmp_path / "stopped"
    processes = pair(place, stopped, flags=["--config.run.save_every=0"])  # only a signal saves
    deadline = time.monotonic() + 200
    while not (stopped / "config.json").is_file():  # then the step is compiled
        assert processes[0].poll() is None, processes[0].communicate()[1]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.002)
    processes[1].terminate()
    found = [re.search(r"step (\d+) is saved and can be", e) for e in ended(processes, code=1)]
    (step,) = {int(match[1]) if match else None for match in found}
    assert step and Checkpoints(stopped).steps == [step]
    assert lines(stopped)[-1]["step"] == step < 24  # reported up to the checkpoint
    assert f"resuming at step {step} of 24" in ended(pair(place, stopped), code=0)[0]
    for ours, theirs in zip(lines(stopped), lines(finished), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-3, err_msg=name)
    name = "heads/medusa_lm_head.safetensors"
    ours, theirs = load_file(stopped / name), load_file(finished / name)
    for key in theirs:
        np.testing.assert_allclose(ours[key], theirs[key], atol=1e-3)


@pytest.mark.e2e
@pytest.mark.slow
def test_processes_that_do_not_share_their_directory(place: Path, tmp_path: Path):
    for said in ended(pair(place, tmp_path / "a", tmp_path / "b"), code=2):
        assert "processes [1] of 2 do not see what process 0 writes there" in said
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and not list((tmp_path / "a").iterdir())


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_what_is_left_of_two_processes_says_so_and_ends(place: Path, tmp_path: Path, victim: int):
    """Process 0 is that which JAX of all others depends on."""
    flags = ["--config.optim.steps=4000", "--config.run.save_every=8"]
    processes = pair(place, tmp_path / "run", flags=[*flags, "--config.run.eval_every=0"])
    wait_for_checkpoint(tmp_path / "run", 8, processes[victim])
    processes[victim].kill()
    killed = time.monotonic()
    _, err = processes[1 - victim].communicate(timeout=60)
    processes[victim].communicate()
    # At once; by missing heartbeats where it was killed while it saved; and a busy machine is slow.
    assert time.monotonic() - killed < partners.HEARTBEAT + 15
    assert processes[1 - victim].returncode == 1
    assert "stack trace" not in err and "Traceback" not in err
    last = Checkpoints(tmp_path / "run").latest
    assert err.splitlines()[-1] == (
        "error: another process is gone; the last good checkpoint: "
        f"{tmp_path / 'run/checkpoints'}/{last}; start all again"
    )


class Bucket(MemoryFileSystem):
    """An object store in memory, in place of Google's."""

    protocol, store, pseudo_dirs = ("gcs", "gs"), {}, [""]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """gs://bucket/run, but for its checkpoints, which tensorstore would send to Google."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(checkpoints, "open_workdir", lambda _: tmp_path)
    return workdir.open_workdir("gs://bucket/run")


@pytest.mark.slow
def test_a_run_in_a_bucket(place: Path, finished: Path, bucket: Path):
    flags = ["--config.run.tensorboard=true"]
    code, err = train(place, bucket, *flags)
    assert code == 0, err
    assert "wrote gs://bucket/run/heads" in err
    assert "no TensorBoard events: they need google.cloud.storage" in err
    assert lines(bucket) == lines(finished)
    names = ["heads/medusa_lm_head.safetensors", "heads/medusa_lm_head.pt", "data.json"]
    for name in names:
        assert (bucket / name).read_bytes() == (finished / name).read_bytes()
    code, err = train(place, bucket, *flags)
    assert code == 0, err
    assert "resuming at step 24 of 24" in err
    assert lines(bucket) == lines(finished)
    code, err = train(place, bucket, "--config.seed=3")
    assert code == 2
    assert "seed: 0 -> 3" in err


@pytest.mark.parametrize(
    ("name", "message"),
    [("az://bucket/run", "cannot be reached: "), ("ftp://host/run", "expected a directory, or gs")],
)
def test_addresses_that_cannot_be_reached(place: Path, name: str, message: str):
    code, err = train(place, name)
    assert code == 2
    assert f"--workdir {name}" in err and message in err
