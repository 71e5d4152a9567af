"""Requests of OpenAI's interface, as the server takes them.

https://platform.openai.com/docs/api-reference/chat and /completions. Fields that would change
the answer and are not supported are refused; others that are unknown are left alone, as in vLLM.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from medusa_jax.decoding.sampling import RowSampling
from medusa_jax.server.problems import Problem

MOST_CHOICES, MOST_STOPS, MOST_STOP_IDS = 16, 16, 8
MOST_ALTERNATIVES = 1000  # beyond what a server is started with; OpenAI has 20
TYPICAL_TEMPERATURE = 0.7
# Neutral values of fields that are not supported. Any other value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "use_beam_search": (None, False),
}
Token = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(pydantic.BaseModel):
    """How a stream ends."""

    include_usage: bool = False


class Request(pydantic.BaseModel):
    """What both kinds of requests share. Temperature 0 decodes greedily.

    Ours are `acceptance`, `speculative` (false decodes plainly) and `stream_steps` (each chunk of
    a stream has the text of each step).
    """

    model_config = pydantic.ConfigDict(extra="allow", strict=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: (
        str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS)]
    ) | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_STOP_IDS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    acceptance: Literal["lossless", "typical"] | None = None
    speculative: bool | None = None
    stream_steps: bool | None = None

    @property
    def stops(self) -> list[str]:
        """Strings that end a text."""
        return [self.stop] if isinstance(self.stop, str) and self.stop else list(self.stop or [])

    @property
    def sampling(self) -> RowSampling:
        """How its texts are sampled, with OpenAI's defaults."""
        typical = self.acceptance == "typical"
        temperature = self.temperature
        if temperature is None:
            temperature = TYPICAL_TEMPERATURE if typical else 1.0
        top_p = 1.0 if self.top_p is None else self.top_p
        asks = self.alternatives is not None
        return RowSampling(temperature, max(self.top_k or 0, 0), top_p, typical, asks)

    @property
    def alternatives(self) -> int | None:
        """Likeliest tokens whose log-probabilities it asks for; None where it asks for none."""
        return None

    @property
    def new_tokens(self) -> int | None:
        """Most new tokens, or None where the request does not say."""
        return self.max_tokens

    def refuse_unsupported(self, most_alternatives: int) -> None:
        """Raises Problem where the request asks for what the server does not do."""
        if (self.alternatives or 0) > most_alternatives:
            raise Problem(
                400, f"logprobs of {self.alternatives} tokens were asked for; this server keeps at "
                f"most {most_alternatives} (--max_logprobs)", "logprobs",
            )  # fmt: skip
        if self.acceptance == "typical" and self.temperature == 0:
            raise Problem(400, "typical acceptance needs a temperature above 0", "temperature")
        for name, value in (self.model_extra or {}).items():
            if name in _NEUTRAL and value not in _NEUTRAL[name]:
                raise Problem(400, f"{name} is not supported by this server", name, "unsupported")


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None

    @pydantic.model_validator(mode="after")
    def _alternatives_are_of_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """POST /v1/completions: a text or token ids, or a list of either."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None

    @pydantic.field_validator("logprobs", mode="before")
    @classmethod
    def _false_is_none(cls, value: Any) -> Any:
        return None if value is False else value

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default
