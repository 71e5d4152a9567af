"""Trains Medusa heads, alone or with their backbone: `configs/` has the recipes."""

import argparse
import sys

from medusa_jax.cli import runner
from medusa_jax.errors import needs

EXAMPLE = """python train.py --config configs/vicuna7b_medusa2.py --workdir runs/vicuna7b
  python train.py --config configs/vicuna7b_medusa2.py --config.optim.learning_rate=1e-4 ...
  python train.py --config configs/vicuna7b_medusa2.py --compile_only v5e:4x4"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags; what begins with --config. is left in `overrides`."""
    parser = runner.parser(__doc__ or "", EXAMPLE)
    add = parser.add_argument
    add("--config", required=True, help="a Python file with get_config(); see configs/")
    add("--workdir", help="directory of the run, or gs://...; a run that is there is resumed")
    add("--compile_only", metavar="TOPOLOGY", help="v5e:4x4, v5p:2x2x2, ..., or cpu:8: compile "
        "the step for it, print bytes per device, and train nothing")  # fmt: skip
    flags, flags.overrides = parser.parse_known_args(arguments)
    unknown = [name for name in flags.overrides if name.startswith("-") and "--config." not in name]
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)} (settings are --config.name=value)")
    if not flags.workdir and not flags.compile_only:
        parser.error("--workdir is needed")
    return flags


def main(flags: argparse.Namespace) -> None:
    """Trains, or only compiles."""
    with needs("train"):
        from medusa_jax.training import aot, config_file, trainer

    config = config_file.read_config(flags.config, flags.overrides)
    if flags.compile_only:
        aot.compile_step(config, flags.compile_only)
    else:
        trainer.train(config, flags.workdir)


if __name__ == "__main__":
    runner.run(main, parse(sys.argv[1:]))
