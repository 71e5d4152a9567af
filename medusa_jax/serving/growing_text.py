"""The text of an answer as its tokens come, up to the first stop string."""

from collections.abc import Sequence

from medusa_jax.data.tokenizer import ChatTokenizer, TextStream


class GrowingText:
    """Tokens to text, which ends before the first stop string that it holds.

    Attributes:
      stopped: whether it has ended so.
    """

    def __init__(
        self, text: ChatTokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self.stopped = False
        self._stream, self._stop = TextStream(text, prompt_ids), stop
        self._shown: list[str] = []
        self._taken, self._held = 0, ""

    def read(self, token_ids: Sequence[int]) -> int | None:
        """Reads tokens; returns how many, the token that completes a stop string included.

        None where no stop string is complete yet: then all of them were read.
        """
        for number, token in enumerate(token_ids, 1):
            self._add(self._stream.push([token]))
            if self.stopped:
                return number
        return None

    def take(self) -> list[str]:
        """What became certain since this was last asked for, token by token."""
        new = self._shown[self._taken :]
        self._taken = len(self._shown)
        return new

    def finish(self) -> str:
        """All of the text, whose tokens have ended: what was held back belongs to it."""
        if not self.stopped:
            self._add(self._stream.finish())
        self._shown.append(self._held)
        self._held = ""
        return "".join(self._shown)

    def _add(self, piece: str) -> None:
        shown, self._held, self.stopped = split(self._held + piece, self._stop)
        self._shown.append(shown)


def split(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """The text before a stop string, what may yet become part of one, and whether one is there.

    With the stop string "END": "ab EN" -> ("ab ", "EN", False), and "ab ENDED" ->
    ("ab ", "", True). Of several, the one that is complete first counts.
    """
    places = [(text.find(one), len(one)) for one in stop]
    ends = [(start + length, start) for start, length in places if start >= 0]
    if ends:
        return text[: min(ends)[1]], "", True
    longest = min(max((length for _, length in places), default=1) - 1, len(text))
    for size in range(longest, 0, -1):
        if any(one.startswith(text[-size:]) for one in stop):
            return text[:-size], text[-size:], False
    return text, "", False
