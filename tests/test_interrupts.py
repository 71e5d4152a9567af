"""Signals in small processes: each ends at once, says so once, and closes what is open."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

# In a callback of the garbage collector Python swallows what a handler raises, as in JAX's.
SWALLOWED = """
import gc, time
from medusa_jax import interrupts

def callback(phase, info):
    if phase == "start":
        print("ready", flush=True)
        time.sleep(0.4)

interrupts.listen()
try:
    with interrupts.unwinding():
        gc.callbacks.append(callback)
        gc.collect()
        gc.callbacks.clear()
        time.sleep(20)
except KeyboardInterrupt:
    print("closed", flush=True)
    interrupts.end()
"""
IMPORTING = """
import sys
from medusa_jax import interrupts

sys.path.insert(0, "PLACE")
interrupts.listen()
try:
    with interrupts.unwinding():
        import slow
        print("lost", flush=True)
        import time
        time.sleep(20)
except KeyboardInterrupt:
    print("closed", flush=True)
    interrupts.end()
"""
STUCK = """
import hashlib
from medusa_jax import interrupts

interrupts.listen()
with interrupts.unwinding():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # compiled code that does not return
"""
NOTHING_OPEN = """
import time
from medusa_jax import interrupts

interrupts.listen()
print("ready", flush=True)
try:
    time.sleep(20)
finally:
    print("unwound", flush=True)
"""
STEPS = """
import time
from medusa_jax import interrupts

interrupts.listen()
with interrupts.unwinding(), interrupts.Stop() as stop:
    print("ready", flush=True)
    while not stop.number:
        time.sleep(0.01)
    print(f"saving after {stop.number}", flush=True)
    time.sleep(SAVING)
    print("saved", flush=True)
"""


def start(script: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen, within: float) -> tuple[int, str, str]:
    began = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - began < within
    return process.returncode, out, err.strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_python_swallows_comes_again(number: signal.Signals):
    process = start(SWALLOWED)
    process.send_signal(number)
    assert ended(process, 1.5) == (130, "closed\n", "error: interrupted")


def test_an_import_is_not_broken_off(tmp_path: Path):
    slow = 'import time\nprint("ready", flush=True)\ntime.sleep(0.4)\nprint("whole", flush=True)'
    (tmp_path / "slow.py").write_text(slow)
    process = start(IMPORTING.replace("PLACE", str(tmp_path)))
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process, 1.5)
    assert (code, err) == (130, "error: interrupted")
    assert out.startswith("whole\n") and out.endswith("closed\n")


def test_compiled_code_that_does_not_return_is_ended():
    process = start(STUCK)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert ended(process, 3) == (130, "", "error: interrupted")


def test_with_nothing_open_nothing_is_unwound():
    process = start(NOTHING_OPEN)
    process.send_signal(signal.SIGINT)
    assert ended(process, 1) == (130, "", "error: interrupted")


def test_steps_end_by_themselves_and_a_second_signal_ends_them_at_once():
    process = start(STEPS.replace("SAVING", "0.1"))
    process.send_signal(signal.SIGTERM)
    assert ended(process, 1) == (0, "saving after 15\nsaved\n", "")
    process = start(STEPS.replace("SAVING", "20"))
    process.send_signal(signal.SIGINT)
    assert process.stdout and process.stdout.readline() == "saving after 2\n"
    process.send_signal(signal.SIGINT)
    assert ended(process, 1) == (130, "", "error: interrupted")
