"""How a command starts: ready for Ctrl-C, before the imports that take seconds.

A file that can be run begins with a call of `start`. So nothing large is imported here.
"""

import gc
import importlib
import os
import sys

from medusa_jax import interrupts

# Commands whose `main` is not in the module of their name.
_PLACES = {"bench": "bench.__main__", "decode": "cli.decode_command"}
_DEVICES = ("accel*", "vfio/*", "nvidia*", "dxg", "kfd")  # files of TPUs and GPUs


def start(name: str) -> None:
    """Imports the command of that name and runs its `main`."""
    interrupts.listen()
    _leave_out_absent_tpus()
    gc.disable()  # of what is imported, little is garbage: to look for it took a tenth of a start
    try:
        command = importlib.import_module(f"medusa_jax.{_PLACES.get(name, name)}")
    finally:
        gc.enable()
    command.main()


def console() -> None:
    """The installed commands: "medusa-count-bigrams" starts `count_bigrams`."""
    start(os.path.basename(sys.argv[0]).removeprefix("medusa-").replace("-", "_"))


def _leave_out_absent_tpus() -> None:
    """Keeps JAX from trying libtpu where there is no TPU, which prints errors at each start."""
    import glob
    import importlib.util

    there = any(glob.glob(f"/dev/{name}") for name in _DEVICES)
    if not there and importlib.util.find_spec("libtpu") is not None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
