"""Trains Medusa heads, alone or with their backbone: `configs/` has the recipes."""

import sys

from medusa_jax.cli import runner
from medusa_jax.train import main, parse

if __name__ == "__main__":
    runner.run(main, parse(sys.argv[1:]))
