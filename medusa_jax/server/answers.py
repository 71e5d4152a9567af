"""Answers in OpenAI's form: whole ones, and the chunks of a stream."""

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from medusa_jax.decoding.logprobs import TextLogprobs
from medusa_jax.decoding.state import Output
from medusa_jax.server.logprobs import LogprobWriter
from medusa_jax.server.metrics import speculation
from medusa_jax.serving.worker import Piece


@dataclasses.dataclass(frozen=True)
class Form:
    """How the answers of one request are written.

    Attributes:
      chat: whether it is a chat, else a completion.
      model: the name that the server gives its model.
      logprobs: writes them, or None where the request does not ask for them.
      id, created: of this answer.
    """

    chat: bool
    model: str
    logprobs: LogprobWriter | None = None
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, texts: Sequence[str], outputs: Sequence[Output]) -> dict[str, Any]:
        """An answer that is complete: a choice for each text."""
        choices = []
        for index, (text, output) in enumerate(zip(texts, outputs, strict=True)):
            said: dict[str, Any] = {"text": text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": text}}
            said |= self._logprobs(output.token_ids, output.logprobs, 0)
            choices.append({"index": index, "finish_reason": output.finish_reason} | said)
        return self._object("") | {
            "choices": choices,
            "usage": usage(outputs),
            "metrics": self._metrics(outputs),
        }

    def first(self, index: int) -> str:
        """The chunk that opens a choice of a chat."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def chunk(self, index: int, piece: Piece, *, steps: bool, offset: int = 0) -> str:
        """What a choice gained, and how it ended.

        Args:
          steps: also write the text of each step, and the engine's time so far.
          offset: characters of the tokens before these.
        """
        text = "".join(piece.texts)
        said: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
        if steps:
            said["steps"] = by_step(piece.texts, piece.steps)
            said["seconds"] = round(piece.seconds, 5)
        said |= self._logprobs(piece.token_ids, piece.logprobs, offset)
        reason = piece.output.finish_reason if piece.output else None
        return self._chunk(index, said, reason)

    def last(self, outputs: Sequence[Output]) -> str:
        """The chunk with usage and figures, which has no choice."""
        figures = {"usage": usage(outputs), "metrics": self._metrics(outputs)}
        return event(self._object(".chunk") | {"choices": []} | figures)

    def _chunk(self, index: int, said: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": index, "finish_reason": reason, "logprobs": None} | said
        return event(self._object(".chunk") | {"choices": [choice]})

    def _logprobs(
        self, token_ids: Sequence[int], found: TextLogprobs | None, offset: int
    ) -> dict[str, Any]:
        if self.logprobs is None or found is None:
            return {"logprobs": None}
        return {"logprobs": self.logprobs.write(token_ids, found, offset)}

    def _object(self, suffix: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        # Chunks of completions are named like whole ones.
        name = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {
            "id": f"{prefix}-{self.id}",
            "object": name,
            "created": self.created,
            "model": self.model,
        }

    def _metrics(self, outputs: Sequence[Output]) -> dict[str, Any]:
        return {"speculative_decoding": speculation(outputs)}


def usage(outputs: Sequence[Output]) -> dict[str, int]:
    """Tokens of a request; a prompt counts once for all its choices."""
    prompts = {tuple(output.prompt_ids) for output in outputs}
    prompt = sum(map(len, prompts))
    completion = sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def by_step(texts: Sequence[str], steps: Sequence[int]) -> list[dict[str, Any]]:
    """Each step's text and the number of its tokens.

    ("a", "b", "c", "d") in steps of (3, 1) -> "abc" of 3 tokens, "d" of 1. Text beyond the last
    step, which was held back, belongs to it.
    """
    joined, start = [], 0
    for number, size in enumerate(steps):
        end = None if number == len(steps) - 1 else start + size
        joined.append({"text": "".join(texts[start:end]), "tokens": size})
        start += size
    return joined


def event(content: dict[str, Any] | str) -> str:
    """A server-sent event."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n"
