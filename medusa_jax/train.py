"""Trains Medusa heads, alone or with their backbone: `configs/` has the recipes."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from medusa_jax.cli.start import start

    start("train")

import argparse

from medusa_jax import interrupts
from medusa_jax.cli import flags, runner
from medusa_jax.errors import needs

EXAMPLE = """python train.py --config configs/vicuna7b_medusa2.py --workdir runs/vicuna7b
  python train.py --config configs/vicuna7b_medusa2.py --config.optim.learning_rate=1e-4 ...
  python train.py --config configs/vicuna7b_medusa2.py --compile_only v5e:4x4"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; those that begin with --config. are left in `overrides`."""
    parser = flags.parser(__doc__ or "", EXAMPLE)
    add = parser.add_argument
    add("--config", required=True, help="a Python file with get_config(); see configs/")
    add("--workdir", help="directory of the run, or gs://...; a run that is there is resumed")
    add("--compile_only", metavar="TOPOLOGY", help="v5e:4x4, v5p:2x2x2, ..., or cpu:8: compile "
        "the step for it, print bytes per device, and train nothing")  # fmt: skip
    namespace, overrides = parser.parse_known_args(arguments)
    unknown = [name for name in overrides if name.startswith("-") and "--config." not in name]
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)} (settings are --config.name=value)")
    if not namespace.workdir and not namespace.compile_only:
        parser.error("--workdir is needed")
    namespace.overrides = overrides
    return namespace


def run(namespace: argparse.Namespace) -> None:
    """Trains, or only compiles."""
    with interrupts.at_once():  # what a run must save or remove it looks after itself
        with needs("train"):
            from medusa_jax.training import aot, config_file, trainer

        config = config_file.read_config(namespace.config, namespace.overrides)
        if namespace.compile_only:
            aot.compile_step(config, namespace.compile_only)
        else:
            trainer.train(config, namespace.workdir)


def main() -> None:
    """The command `medusa-train`, which train.py runs too."""
    runner.run(run, parse())
