"""What went wrong with a request, in the form that OpenAI's clients read."""

import dataclasses
from typing import Any

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
