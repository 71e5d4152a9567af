"""JSON from outside: a single reader, whose errors name the file and the field.

Files of a model directory, prompts and training data are untrusted: any of them may be
nested too deeply, hold numbers of any length, or values of any type.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa_jax.errors import InputError
from medusa_jax.files import write_whole

MOST_BYTES = 2**28  # of a JSON file that is read whole
_REQUIRED: Any = object()


def parse(text: str, origin: str) -> Any:
    """The value of a JSON text, whose strings are whole Unicode.

    Half of a surrogate pair becomes U+FFFD, as in a decoder of UTF-16: no tokenizer and no
    file takes it as it is.

    Raises:
      InputError: it is not JSON, is nested too deeply, or holds a number of too many digits;
        the message begins with `origin`.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError(f"{origin}: JSON is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{origin}: not JSON: {error}") from None
    # Only an escape can write such a half, for the text itself was decoded from UTF-8.
    return _whole(value) if "\\ud" in text or "\\uD" in text else value


def whole_text(text: str) -> str:
    """The text without halves of surrogate pairs: "a\\ud83d" -> "a\\ufffd"."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def read(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
      InputError: no such file, larger than MOST_BYTES, or not JSON; names `path`.
    """
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if not path.is_file():
            raise InputError(f"{path} is no file")
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise InputError(f"{path}: more than {MOST_BYTES:,} bytes are too many for settings")
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    return parse(text, str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
      InputError: as `read`, or the file holds another type of value.
    """
    content = read(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def write(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Writes a JSON object whole or not at all.

    Raises:
      OutputError: it could not be written; names `path`.
    """
    write_whole(path, json.dumps(content, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a JSON object, each asked for by its type; null counts as absent.

    Example: Fields({"eos_token_id": [2, 3]}, "config.json").integers("eos_token_id") -> (2, 3)

    Attributes:
      content: the object.
      origin: where it stands, for messages.

    Every method raises InputError for a value of another type or out of bounds, and, without
    a default, for a missing value.
    """

    content: Mapping[str, Any]
    origin: str

    def integer(
        self, key: str, default: int = _REQUIRED, *, least: int = 1, most: int = 2**31 - 1
    ) -> int:
        """An integer between `least` and `most`."""
        value = self._get(key, default)
        if value is default or (type(value) is int and least <= value <= most):
            return value
        raise self._wrong(key, f"an integer from {least} to {most}", value)

    def number(
        self,
        key: str,
        default: float = _REQUIRED,
        *,
        above: float | None = None,
        least: float | None = None,
        most: float | None = None,
    ) -> float:
        """A finite number: greater than `above`, from `least` to `most`."""
        value = self._get(key, default)
        if value is default:
            return value
        number = type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
        if (
            number
            and (above is None or value > above)
            and (least is None or value >= least)
            and (most is None or value <= most)
        ):
            return float(value)
        bounds = {" above": above, " from": least, " up to": most}
        words = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
        raise self._wrong(key, f"a finite number{''.join(words)}", value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._get(key, default)
        if isinstance(value, bool):
            return value
        raise self._wrong(key, "true or false", value)

    def text(self, key: str, default: str = _REQUIRED) -> str:
        """A string."""
        value = self._get(key, default)
        if value is default or isinstance(value, str):
            return value
        raise self._wrong(key, "a string", value)

    def integers(self, key: str, *, least: int = 0, most: int = 2**31 - 1) -> tuple[int, ...]:
        """An integer, or a list of integers; absent, none."""
        value = self._get(key, [])
        values = value if isinstance(value, list) else [value]
        if all(type(item) is int and least <= item <= most for item in values):
            return tuple(values)
        raise self._wrong(key, f"an integer from {least} to {most}, or a list of them", value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; absent, none."""
        value = self._get(key, [])
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise self._wrong(key, "a list of strings", value)

    def inner(self, key: str) -> "Fields":
        """An object inside; absent, an empty one."""
        value = self._get(key, {})
        if isinstance(value, dict):
            return Fields(value, f"{self.origin}: {key!r}")
        raise self._wrong(key, "an object", value)

    def _get(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        if value is None and default is _REQUIRED:
            raise InputError(f"{self.origin} has no {key!r}")
        return default if value is None else value

    def _wrong(self, key: str, expected: str, value: Any) -> InputError:
        return InputError(f"{self.origin}: {key!r} must be {expected}, got {short(value)}")


def short(value: Any) -> str:
    """A value for a message, at most 60 characters of it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # digits or levels beyond Python's limits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _whole(value: Any) -> Any:
    """A JSON value with `whole_text` of each string."""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {whole_text(key): _whole(item) for key, item in value.items()}
    return value
