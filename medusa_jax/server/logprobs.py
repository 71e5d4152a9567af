"""Log-probabilities in the two forms of OpenAI's interface."""

from collections.abc import Sequence
from typing import Any

from medusa_jax.data.token_bytes import TokenBytes
from medusa_jax.decoding.logprobs import TextLogprobs

LEAST = -9999.0  # JSON has no -inf


class LogprobWriter:
    """Writes the log-probabilities of a request's tokens.

    The bytes of all tokens together are those of the text, special tokens and what follows a stop
    string included.
    """

    def __init__(self, tokens: TokenBytes, chat: bool, alternatives: int) -> None:
        self._tokens, self._chat, self._alternatives = tokens, chat, alternatives

    def write(self, ids: Sequence[int], found: TextLogprobs, offset: int) -> dict[str, Any]:
        """The object `logprobs` of a choice.

        Args:
          offset: characters of the tokens before these.
        """
        chosen = [self._entry(*one) for one in zip(ids, found.chosen.tolist(), strict=True)]
        k = self._alternatives
        tops = zip(found.top_ids[:, :k].tolist(), found.top[:, :k].tolist(), strict=True)
        others = [[self._entry(*one) for one in zip(*top, strict=True)] for top in tops]
        if self._chat:
            content = [
                entry | {"top_logprobs": top} for entry, top in zip(chosen, others, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for entry in chosen:
            offsets.append(offset)
            offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in chosen],
            "token_logprobs": [entry["logprob"] for entry in chosen],
            # Tokens that read alike have the likeliest's.
            "top_logprobs": [
                {one["token"]: one["logprob"] for one in [entry, *reversed(top)]}
                for entry, top in zip(chosen, others, strict=True)
            ],
            "text_offset": offsets,
        }

    def length(self, ids: Sequence[int]) -> int:
        """Characters of tokens."""
        return sum(len(self._string(token)) for token in ids)

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        said = {"token": self._string(token), "logprob": max(logprob, LEAST)}
        return said | {"bytes": list(self._tokens.of(token))} if self._chat else said

    def _string(self, token: int) -> str:
        return self._tokens.of(token).decode("utf-8", "replace")
