"""Writes the weights of a training run's checkpoint in the original's formats.

A run writes its last weights by itself; this is for any checkpoint it still has.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from medusa_jax.cli.start import start

    start("export")

import dataclasses

import jax

from medusa_jax.cli import runner
from medusa_jax.distributed.rules import start_processes
from medusa_jax.errors import InputError
from medusa_jax.files import check_new_directory, writing
from medusa_jax.options import option
from medusa_jax.progress import say
from medusa_jax.training import export, settings
from medusa_jax.training.checkpoints import Checkpoints
from medusa_jax.training.mesh import make_mesh
from medusa_jax.training.optimizer import optimizer
from medusa_jax.training.setup import starting_state
from medusa_jax.training.weights import load
from medusa_jax.training.workdir import (
    is_address,
    local_copy,
    open_workdir,
    read_data,
    read_settings,
)

EXAMPLE = "python -m medusa_jax.export --workdir runs/vicuna7b_medusa1 --step 400 --output exported"


@dataclasses.dataclass(kw_only=True)
class Options:
    """The options."""

    workdir: str = option(help="of the run: a directory, or an address such as gs://bucket/run")
    step: int | None = option(None, help="of the checkpoint (default: the newest)")
    output: str | None = option(None, help="directory to write under (default: the run's own)")
    dtype: str = option("", help="float32, bfloat16 or float16 (default: as the run would)")


def run(options: Options) -> None:
    """Restores the checkpoint and writes it."""
    workdir = open_workdir(options.workdir)
    config = read_settings(workdir)
    config.run.export_dtype = options.dtype or config.run.export_dtype
    settings.check(config)
    target = open_workdir(options.output or workdir)
    made = export.destination(config, target)
    if options.output and not is_address(target):
        check_new_directory(made)
    elif options.output and made.exists():
        raise InputError(f"{made} exists already; give another --output")
    start_processes()
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest if options.step is None else options.step
    if step is None:
        raise InputError(f"{workdir} has no checkpoint")
    if step not in checkpoints.steps:
        kept = ", ".join(map(str, checkpoints.steps)) or "none"
        raise InputError(f"{workdir} has no checkpoint of step {step}; it has {kept}")
    mesh = make_mesh(settings.Mesh())
    token_map = read_data(workdir).integers("token_map")
    weights = load(config, mesh, token_map, with_learnt=False, with_frozen=config.mode != "medusa1")
    state, _ = starting_state(weights, optimizer(config, 1), mesh, donate=False)
    say(f"exporting step {step}")
    trained = checkpoints.restore(state, step).trainable
    first = jax.process_index() == 0
    with local_copy(target, write=first) as directory, writing(made):
        export.export(config, weights.with_trained(trained), directory, write=first)
    print(made)


def main() -> None:
    """The command `medusa-export`."""
    runner.command(run, Options, __doc__ or "", EXAMPLE)
