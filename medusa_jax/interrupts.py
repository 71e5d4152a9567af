"""SIGINT (Ctrl-C) and SIGTERM: how a process that is asked to end does so, at any moment.

Python runs a signal's handler between two bytecodes of the main thread, and what the handler
raises may end in code that swallows it. So a thread hears of each signal beside the main thread:

    listen()                nothing to save: the process ends at once
    with unwinding():       KeyboardInterrupt closes what is open, within GRACE_SECONDS
    with Stop() as stop:    `stop.number` is set, and the steps that look at it save their work
"""

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator

INTERRUPTED = 130  # the exit code
GRACE_SECONDS = 1.5  # then a process that is stuck in compiled code is ended from outside
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen() -> None:
    """From now on the signals end this process. Signals that are ignored or handled stay so."""
    mine = [number for number in _SIGNALS if signal.getsignal(number) is _handle]
    if mine or threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _handle)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


class _AtOnce:
    """Nothing is open."""

    def heard(self, number: int) -> None:
        """A signal has come; called in the listening thread."""
        end()

    def handle(self, frame: types.FrameType | None) -> None:
        """The same signal, in the main thread, which is at `frame`."""


class _Unwinding(_AtOnce):
    """The first signal raises KeyboardInterrupt, again where it was swallowed."""

    def __init__(self) -> None:
        self.number = 0
        self._raised = False
        self.timers: list[threading.Timer] = []

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return bool(self.number or self._raised)

    def heard(self, number: int) -> None:
        if not self.number:
            self.number = number
            self._later(GRACE_SECONDS, end)

    def handle(self, frame: types.FrameType | None) -> None:
        if self._raised:
            return
        if _importing(frame):
            self.again()
            return
        self._raised = True
        raise KeyboardInterrupt

    def again(self) -> None:
        """The exception was lost in a callback, or would be: the signal is sent once more."""
        self._raised = False
        self._later(0.02, _send_again, self.number or signal.SIGINT)

    def _later(self, seconds: float, action: Callable[..., object], *arguments: object) -> None:
        timer = threading.Timer(seconds, action, arguments)
        timer.daemon = True
        self.timers.append(timer)
        timer.start()


class Stop(_AtOnce):
    """Around steps that can be saved: which signal has asked them to stop; a second one ends all.

    Args:
      hand_on: SIGINT becomes SIGTERM, for which JAX listens where several processes must agree.

    Attributes:
      number: of the signal, 0 before it comes.
    """

    def __init__(self, *, hand_on: bool = False) -> None:
        self.number = 0
        self._hand_on = hand_on

    def heard(self, number: int) -> None:
        if self.number:
            end()
        self.number = number
        if self._hand_on and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> "Stop":
        _plans.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _plans.remove(self)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Around work within `unwinding` that leaves nothing open, such as long imports."""
    plan = _AtOnce()
    _plans.append(plan)
    try:
        yield
    finally:
        _plans.remove(plan)


@contextlib.contextmanager
def unwinding() -> Iterator[_Unwinding]:
    """Around work that closes files and removes what is half written when it is interrupted."""
    plan, before = _Unwinding(), sys.unraisablehook

    def swallowed(unraisable: "sys.UnraisableHookArgs") -> None:
        if plan in _plans and issubclass(unraisable.exc_type, KeyboardInterrupt):
            plan.again()
        else:
            before(unraisable)

    _plans.append(plan)
    sys.unraisablehook = swallowed
    try:
        yield plan
    finally:
        if sys.unraisablehook is swallowed:  # else another has taken it into its own
            sys.unraisablehook = before
        _plans.remove(plan)
        for timer in plan.timers:
            timer.cancel()


def end(message: str = "interrupted") -> None:
    """Ends this process now, with one message, from any thread."""
    if _ending.acquire(blocking=False):
        os.write(2, f"\nerror: {message}\n".encode())  # the main thread may hold sys.stderr
        os._exit(INTERRUPTED)
    threading.Event().wait()  # another thread is at it


_ending = threading.Lock()
_sent_again: list[int] = []  # signals of our own, which the listening thread has not heard yet
_plans: list[_AtOnce] = [_AtOnce()]  # the last one counts


def _send_again(number: int) -> None:
    _sent_again.append(number)
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def _watch(reader: int) -> None:
    while True:
        number = os.read(reader, 1)[0]
        if number in _sent_again:  # meant for the main thread, which may have unwound by now
            _sent_again.remove(number)
            continue
        if number in _SIGNALS and signal.getsignal(number) is _handle:  # else it is another's
            _plans[-1].heard(number)


def _handle(number: int, frame: types.FrameType | None) -> None:
    _plans[-1].handle(frame)


def _importing(frame: types.FrameType | None) -> bool:
    """Whether a frame is inside an import; modules in C can crash when they are broken off."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
