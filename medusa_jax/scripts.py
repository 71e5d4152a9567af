"""The installed commands: `medusa-NAME` runs what `python -m medusa_jax.NAME` runs."""

import runpy
import sys
from pathlib import Path


def command() -> None:
    """Runs the module that the name of the installed script names."""
    name = Path(sys.argv[0]).stem.removeprefix("medusa-")
    # `medusa_jax.decode` is a library to import; its command line is a module of `cli`.
    module = "cli.decode_main" if name == "decode" else name
    runpy.run_module(f"medusa_jax.{module}", run_name="__main__")
