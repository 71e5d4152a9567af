"""Finds the tree that decodes fastest: for these heads, this device, batch and acceptance."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from medusa_jax.cli.start import start

    start("tune")

from medusa_jax.cli import runner
from medusa_jax.files import check_output
from medusa_jax.tuning.tuner import TuneOptions, tune

EXAMPLE = "python -m medusa_jax.tune --model DIR --heads DIR --prompts prompts.jsonl"


def run(options: TuneOptions) -> None:
    """Checks where the output goes, then tunes."""
    check_output(options.output, options.prompts or ())
    tune(options)


def main(arguments: list[str] | None = None) -> None:
    """The command `medusa-tune`."""
    runner.command(run, TuneOptions, __doc__ or "", EXAMPLE, arguments)
