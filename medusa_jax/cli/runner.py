"""How a command ends: with a message for an error, and an exit code."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from medusa_jax import interrupts
from medusa_jax.cli import flags
from medusa_jax.cli.compilation_cache import keep_programs
from medusa_jax.errors import InputError


def command(
    main: Callable[[Any], None],
    options: type,
    description: str,
    example: str,
    arguments: list[str] | None = None,
) -> None:
    """Parses the flags of an options dataclass, and runs `main` with it as `run` does."""
    parser = flags.parser(description, example)
    flags.add_flags(parser, options)
    run(lambda namespace: main(flags.read(namespace, options)), parser.parse_args(arguments))


def run(main: Callable[[argparse.Namespace], None], namespace: argparse.Namespace) -> None:
    """Runs `main` and exits: 0 done, 1 the run failed, 2 the input or the flags are wrong."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    interrupts.listen()
    code, message, failure = 0, "", None
    if not namespace.no_cache:
        keep_programs()
    try:
        _unwound(main, namespace)
    except InputError as error:
        code, message, failure = 2, str(error), error
    except KeyboardInterrupt as stopped:  # all that was open is closed
        code, failure = interrupts.INTERRUPTED, stopped
        message = "; ".join(["interrupted", *map(str, stopped.args)])
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        code, message, failure = 1, _message(error), error
    if failure is not None and namespace.debug:
        traceback.print_exception(failure)
    if code == interrupts.INTERRUPTED:  # nobody waits for JAX to wind down
        sys.stdout.flush()
        interrupts.end(message)
    if failure is not None:
        with_jax = "jax" in sys.modules
        if with_jax and code == 1:
            _partners().end_if_lost(failure)
        print(f"error: {message}", file=sys.stderr, flush=True)
        if with_jax:
            _partners().leave(code)
    sys.exit(code)


def _unwound(main: Callable[[argparse.Namespace], None], namespace: argparse.Namespace) -> None:
    """Runs `main`; once a signal has come, an error is what the interrupt broke."""
    with interrupts.unwinding() as signals:
        try:
            main(namespace)
        except Exception as error:
            if signals.asked:
                raise KeyboardInterrupt from error
            raise


def _message(error: Exception) -> str:
    own = type(error).__module__.startswith("medusa_jax.")  # its message says all there is to say
    return str(error) if own else f"{type(error).__name__}: {error}"


def _partners() -> Any:
    """The other processes of a run, of which only JAX knows."""
    from medusa_jax.distributed import partners

    return partners
