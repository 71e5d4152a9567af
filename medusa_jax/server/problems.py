"""What went wrong with a request, in the form that OpenAI's clients read."""

import dataclasses
from typing import Any

from medusa_jax.errors import InputError
from medusa_jax.serving.worker import Busy, Closing, EngineFailed

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


@dataclasses.dataclass
class Problem(Exception):
    """An answer that is no text.

    Attributes:
      status: the HTTP status.
      message: for a person.
      param: the field of the request that is wrong.
      code: for a program.
      headers: of the answer.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON object that says so."""
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


# What the engine raises for a text.
OF_A_TEXT = (InputError, FloatingPointError, Busy, Closing, EngineFailed)


def problem_of(error: Exception) -> Problem:
    """The answer that says what became of a text."""
    match error:
        case InputError():
            return Problem(400, str(error), code="context_length_exceeded")
        case Busy():
            again = {"Retry-After": "1"}
            return Problem(429, str(error), code="queue_full", headers=again)
        case Closing():
            return Problem(503, "the server is shutting down", headers={"Retry-After": "10"})
        case _:
            return Problem(500, str(error))
