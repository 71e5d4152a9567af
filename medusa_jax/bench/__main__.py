"""Benchmarks: `python -m medusa_jax.bench [prompts | steps | memory] FLAGS`.

Without a word the program is `prompts`. Flags of older command lines choose theirs:
`--random_weights NAME` means `steps`, and with `--compile_only` it means `memory --model NAME`.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from medusa_jax.cli.start import start

    start("bench")

import sys
from collections.abc import Sequence

from medusa_jax.bench import memory, prompts, steps

PROGRAMS = {"prompts": prompts.main, "steps": steps.main, "memory": memory.main}
RANDOM = "--random_weights"


def choose(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The program that the arguments ask for, and its own arguments.

    ("--random_weights", "110m", "--sizes", "1") -> "steps" with the same arguments
    """
    if arguments and arguments[0] in PROGRAMS:
        return arguments[0], list(arguments[1:])
    flags = {argument.partition("=")[0] for argument in arguments}
    if "--compile_only" not in flags:
        return ("steps" if RANDOM in flags else "prompts"), list(arguments)
    return "memory", [
        "--model" + argument.removeprefix(RANDOM)
        if argument.partition("=")[0] == RANDOM
        else argument
        for argument in arguments
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `medusa-bench`."""
    program, own = choose(sys.argv[1:] if arguments is None else arguments)
    PROGRAMS[program](own)
