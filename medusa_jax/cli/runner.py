"""What every command line of the project shares: one message for an error, and its exit code."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable

from medusa_jax.errors import InputError


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """An argument parser with an example under its help and the common flags."""
    made = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def run(main: Callable[[argparse.Namespace], None], flags: argparse.Namespace) -> None:
    """Runs `main` and exits: 0 done, 1 the run failed, 2 the input or the flags are wrong."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        main(flags)
        code, message = 0, None
    except InputError as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except BrokenPipeError:  # the reader of our output has gone: nobody left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, message = 1, None
    except Exception as error:
        code, message = 1, f"{type(error).__name__}: {error}"
    if message is not None:
        if flags.debug:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
