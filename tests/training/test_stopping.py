"""Runs that are stopped, by others or by themselves: what is saved, and that it goes on alike."""

import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from helpers.runs import launch, lines, train, wait_for_checkpoint

from medusa_jax.training import trainer
from medusa_jax.training.checkpoints import Checkpoints
from medusa_jax.training.workdir import claimed


@pytest.mark.e2e
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(place: Path, finished: Path, tmp_path: Path):
    """SIGKILL in the middle, a half-written line of metrics, then on to the end."""
    workdir = tmp_path / "run"
    process = launch(place, workdir)
    wait_for_checkpoint(workdir, 8, process)
    process.kill()
    process.communicate()
    reached = Checkpoints(workdir).latest or 0
    assert 0 < reached < 24
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    code, err = train(place, workdir)
    assert code == 0, err
    assert f"resuming at step {reached} of 24" in err
    assert lines(workdir) == lines(finished)
    name = "heads/medusa_lm_head.safetensors"
    assert (workdir / name).read_bytes() == (finished / name).read_bytes()


JOINT = ["--config.mode=medusa2", "--config.optim.accumulation=2", "--config.lora.dropout=0.2"]


@pytest.mark.e2e
@pytest.mark.slow
def test_sigterm_saves_and_a_restart_goes_on_to_the_same_bits(place: Path, tmp_path: Path):
    """Medusa-2 with dropout and accumulation: all that random numbers and order decide."""
    code, err = train(place, tmp_path / "whole", *JOINT)
    assert code == 0, err
    workdir = tmp_path / "run"
    process = launch(place, workdir, *JOINT)
    wait_for_checkpoint(workdir, 4, process)
    process.terminate()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1, err
    assert "is saved and can be resumed" in err
    code, err = train(place, workdir, *JOINT)
    assert code == 0, err
    assert "resuming at step" in err
    assert lines(workdir) == lines(tmp_path / "whole")
    name = "model/model.safetensors"
    assert (workdir / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.e2e
@pytest.mark.slow
def test_changed_data_is_noticed_before_a_run_goes_on(place: Path, finished: Path, tmp_path: Path):
    data = place / "stories.txt"
    before = data.read_text()
    data.write_text(before + "<|endoftext|>w1 w2 w3")
    try:
        code, err = train(place, finished)
    finally:
        data.write_text(before)
    assert code == 2
    assert "the training data has changed since this run began" in err


@pytest.mark.e2e
@pytest.mark.slow
def test_checkpoints_of_nobody_knows_which_run_are_refused(
    place: Path, finished: Path, tmp_path: Path
):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/config.json").unlink()
    code, err = train(place, tmp_path / "run")
    assert code == 2
    assert "holds checkpoints, but no config.json" in err


@pytest.mark.e2e
@pytest.mark.slow
def test_nan_stops_the_run_and_names_the_last_good_checkpoint(place: Path, tmp_path: Path):
    code, err = train(
        place, tmp_path / "run", "--config.optim.learning_rate=1e30", "--config.optim.clip=0"
    )
    assert code == 1
    message = err.strip().splitlines()[-1]
    assert "step " in message and "loss" in message
    assert "gradient norm" in message
    saved = Checkpoints(tmp_path / "run").latest
    assert (f"checkpoints/{saved}" if saved else "there is none yet") in message


@pytest.mark.e2e
@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(place: Path, tmp_path: Path):
    """Files may grow to 12 KB only, which fails writes as a full disk does."""
    workdir, flags = tmp_path / "run", ["--config.heads.number=6", "--config.run.log_every=8"]
    code, err = train(place, workdir, *flags)
    assert code == 0, err
    whole = lines(workdir)
    for step in (20, 24):
        shutil.rmtree(workdir / f"checkpoints/{step}")
    limit = ["bash", "-c", 'ulimit -f 12; trap "" XFSZ; "$@"', "-"]
    process = launch(place, workdir, *flags, before=limit)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    assert "error: a checkpoint could not be written" in err
    assert f"the last good one: {workdir / 'checkpoints/16'}" in err
    code, err = train(place, workdir, *flags)  # with room again, it goes on from there
    assert code == 0, err
    assert "resuming at step 16 of 24" in err
    assert lines(workdir) == whole


@pytest.mark.e2e
@pytest.mark.slow
def test_ctrl_c_saves_the_step_it_stops_at(place: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    process = launch(place, workdir, "--config.optim.steps=4000", "--config.run.save_every=0")
    metrics = workdir / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 3):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10  # below a second, but for a busy machine
    step = Checkpoints(workdir).latest
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1] == (f"error: interrupted; step {step} is saved and can be resumed")
    assert lines(workdir)[-1]["step"] == step


def test_a_second_run_in_a_directory_is_refused_at_once(place: Path, tmp_path: Path):
    with claimed(tmp_path / "run"):
        code, err = train(place, tmp_path / "run")
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert code == 2 and f"--workdir {tmp_path / 'run'} is written by {owner}: wait" in err
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.e2e
@pytest.mark.slow
def test_a_ruined_run_ends_and_keeps_its_best_checkpoint(place: Path, tmp_path: Path):
    """The rate is set free after eight good steps, as a run that resumes may do."""
    workdir, flags = tmp_path / "run", ["--config.run.keep=1", "--config.run.save_every=2"]
    flags += ["--config.optim.learning_rate=1e5", "--config.optim.warmup_steps=0"]
    flags += ["--config.optim.clip=0", "--config.run.patience=4", "--config.run.eval_every=2"]
    code, err = train(place, workdir, *flags)
    assert code == 1
    assert re.search(r"error: step \d: loss .*, above [\d.]+ for 4 steps", err)
    kept = Checkpoints(workdir).steps
    assert (f"checkpoints/{kept[-1]}" if kept else "there is none yet") in err
    assert not (workdir / "heads").exists()
    assert train(place, workdir, *flags)[0] == 1  # the same again, from the same checkpoint
    assert Checkpoints(workdir).steps == kept


SPOILT = {
    "metrics.jsonl, line 1: expected an object with a 'step'": ("metrics.jsonl", "[1]\n5\n"),
    "metrics.jsonl, line 2: not JSON": ("metrics.jsonl", '{"step": 1}\nnan,\n'),
    "metrics.jsonl, line 1: JSON is nested too deeply": ("metrics.jsonl", "[" * 10**5 + "\n"),
    "config.json: 'heads' must be an object, got 5": ("config.json", '{"heads": 5}'),
    "'number' must be an integer": ("config.json", '{"heads": {"number": "a"}}'),
    "data.json: 'fingerprint' must be an integer": ("data.json", '{"fingerprint": []}'),
    "data.json: not JSON": ("data.json", "{"),
}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("message", SPOILT)
def test_a_spoilt_file_of_a_run_is_named(
    place: Path, finished: Path, tmp_path: Path, message: str, monkeypatch: pytest.MonkeyPatch
):
    """Before any data is read."""
    monkeypatch.setattr(trainer, "read_rows", None)
    name, content = SPOILT[message]
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    (workdir / name).write_text(content)
    code, err = train(place, workdir)
    assert code == 2 and message in err and str(workdir / name) in err


@pytest.mark.parametrize(
    ("rate", "message"),
    [("inf", "must be a finite number, got inf"), ("nan", "must be a finite number, got nan")],
)
def test_a_rate_that_is_no_number_is_refused(place: Path, tmp_path: Path, rate: str, message: str):
    code, err = train(place, tmp_path / "run", f"--config.optim.learning_rate={rate}")
    assert code == 2 and "learning_rate" in err and message in err


def test_a_working_directory_that_cannot_be(place: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    code, err = train(place, tmp_path / "file")
    assert code == 2 and "file: expected a directory, not a file" in err
    code, err = train(place, "/proc/self/run")
    assert code == 2 and "/proc/self/run could not be written" in err
