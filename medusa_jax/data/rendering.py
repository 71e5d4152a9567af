"""Chat templates to text, in a process of their own that is started once and kept.

A template that takes too long ends that process, not this one; the next rendering starts another.
The start takes about a second. Several conversations a call take less time than a call for each.
"""

import atexit
import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medusa_jax import json_files
from medusa_jax.data.messages import Message
from medusa_jax.errors import InputError

SECONDS = 3  # of processor time, which a template has for a conversation
STRIKES = 3  # a template that has ended the process so often is not tried again
# A conversation, and whether its text goes on to where an answer would begin.
Unwritten = tuple[Sequence[Message], bool]
_ENVIRONMENT = {
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "USE_TORCH": "0",  # older transformers import it for types
    "OPENBLAS_NUM_THREADS": "1",  # each reserves memory
}


class Renderer:
    """Renders templates as `apply_chat_template` of transformers does, a call at a time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._strikes: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def render(
        self, template: str, tokens: Mapping[str, Any], conversations: Sequence[Unwritten]
    ) -> list[str]:
        """The texts of conversations.

        Args:
          tokens: the names and texts of special tokens.

        Raises:
          InputError: the template refuses a conversation, or goes beyond the bounds.
        """
        if self._strikes[template] >= STRIKES:
            raise InputError(f"the chat template went beyond its bounds {STRIKES} times")
        asked = {"template": template, "tokens": tokens, "conversations": conversations}
        try:
            line = json.dumps(asked).encode() + b"\n"
        except RecursionError:
            raise InputError("the conversation's tool calls are nested too deeply") from None
        with self._lock:
            reply = self._reply(line)
            if not reply:
                self._strikes[template] += 1
                raise InputError(f"the chat template {self._end()}")
        found = json_files.parse(reply.decode(), "the chat template's text")
        if "error" in found:
            raise InputError(f"the chat template refuses this conversation: {found['error']}")
        return found["texts"]

    def close(self) -> None:
        """Ends the process, if there is any."""
        with self._lock:
            if self._process is not None:
                self._end()

    def _reply(self, line: bytes) -> bytes:
        """The line that answers a line; empty where the process has ended."""
        process = self._process = self._process or _start(self._seconds)
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
            return process.stdout.readline()
        except BaseException:  # an interrupt, after which the answer would go to the next question
            self._end()
            raise

    def _end(self) -> str:
        """Ends the process, and says why it had ended."""
        process, self._process = self._process, None
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdout.close()  # nobody reads an answer any more
        process.kill()
        code = process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        if code == -signal.SIGPROF:
            return f"takes more than {self._seconds:g} s to render: its loops or texts have no end"
        return f"could not be rendered: its process ended with code {code}"


def _start(seconds: float) -> subprocess.Popen[bytes]:
    """A worker in a session of its own, so that Ctrl-C does not reach it."""
    worker = Path(__file__).with_name("render_worker.py")
    return subprocess.Popen(
        [sys.executable, "-P", str(worker), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | _ENVIRONMENT,
        start_new_session=True,
    )


renderer = Renderer()
atexit.register(renderer.close)
