"""How a command ends: a message for an error, its exit code, and at once when it is interrupted."""

import argparse
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from medusa_jax.cli import flags
from medusa_jax.errors import InputError

INTERRUPTED = 130
_SIGNALS: list[int] = []  # that have asked this process to end
GRACE_SECONDS = 1.5  # then a command that is stuck in compiled code is ended from outside


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
    _end_when_interrupted()
    try:
        main(namespace)
        code, message = 0, None
    except InputError as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted"
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, message = 1, None
    except Exception as error:
        code, message = 1, f"{type(error).__name__}: {error}"
        if _SIGNALS:  # what broke off may have raised an error of its own
            code, message = INTERRUPTED, "interrupted"
    if message is not None:
        if namespace.debug:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr, flush=True)
    if code == INTERRUPTED:  # all that was open is closed: nobody waits for JAX to wind down
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _end_when_interrupted() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt; compiled code that does not return is left.

    Python runs signal handlers between bytecodes only. A watching thread hears of the signal
    at once, and ends the process after a time of grace.
    """
    inside = threading.current_thread() is threading.main_thread()
    if not inside or signal.getsignal(signal.SIGINT) is _raise:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _raise)

    def watch() -> None:
        # A command that handles the signal itself, as training does, has replaced the handler.
        while signal.getsignal(os.read(reader, 1)[0]) is not _raise:
            pass
        threading.Event().wait(GRACE_SECONDS)
        print("\nerror: interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


def _raise(number: int, frame: Any) -> None:
    _SIGNALS.append(number)
    raise KeyboardInterrupt
