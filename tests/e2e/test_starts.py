"""How commands start: Ctrl-C at any moment of it, and that each name starts its command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.paths import ROOT

from medusa_jax.cli import start

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

COMMANDS = {
    "decode": ["decode.py", "--prompt", "Once", "--num_samples", "100000"],
    "module": ["-m", "medusa_jax.decode", "--prompt", "Once", "--num_samples", "100000"],
    "train": ["train.py", "--config", "configs/stories_medusa1.py", "--workdir", "WORKDIR"],
    "tune": ["-m", "medusa_jax.tune"],
    "bench": ["-m", "medusa_jax.bench", "--output", "WORKDIR-bench"],
}


def listens(process: subprocess.Popen) -> bool:
    """Whether it has a handler for SIGTERM, which Python by itself has not."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("delay", [0.0, 0.7, 2.5])
def test_ctrl_c_while_a_command_starts(tmp_path: Path, delay: float):
    """In the imports, in the parser and while the model is loaded: one line, within 2 seconds."""
    processes = [
        subprocess.Popen(
            [sys.executable, *(word.replace("WORKDIR", str(tmp_path / "run")) for word in command)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "MEDUSA_JAX_CACHE": str(tmp_path)},
        )
        for command in COMMANDS.values()
    ]
    for process in processes:
        while not listens(process):
            time.sleep(0.005)
    time.sleep(delay)
    for process in processes:
        process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    for process in processes:
        err = process.communicate(timeout=20)[1]
        assert process.returncode == 130, err
        assert err.count("error: interrupted") == 1 and "Traceback" not in err, err
    assert time.monotonic() - sent < 4  # five at once, on two cores


def test_python_m_decode_is_the_command(run_module):
    code, err = run_module("decode", "--prompt", "a", "--acceptance", "nucleus")
    assert code == 2 and "unknown acceptance 'nucleus'" in err


@pytest.mark.parametrize(
    ("program", "usage"),
    [
        ("medusa-count-bigrams", "--tokens"),
        ("medusa-decode", "--compare"),
        ("medusa-bench", "--peers"),
    ],
)
def test_installed_commands(monkeypatch, capsys, program: str, usage: str):
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{program}", "--help"])
    with pytest.raises(SystemExit, match="0"):
        start.console()
    assert usage in capsys.readouterr().out
