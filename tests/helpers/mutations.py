"""Small files spoilt at random: bytes flipped, cut or repeated, and JSON values of other types."""

import json
import random
from collections.abc import Callable
from typing import Any

EVIL: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 7, 100, 0.5, 10**9, 2**31, 2**63, 10**25, -(2**63) - 1),
    *(1e308, float("nan"), float("inf"), "", "x", "1", "../../etc/passwd", "\ud800", "\x00"),
    *("é" * 300, [], [[]], [0] * 40, [None], [1e9], [["a"]], {}, {"a": 1}, {"factor": "a"}),
    {"rope_type": "llama3"},
]
PIECES = (b"0", b"99999999", b"-", b"null", b"[", b"]", b"{", b"1e400", b"\\ud800")
SYMBOLS = b'0123456789[]{}",:-eE.\x00\xff\n'


def of_bytes(rng: random.Random, data: bytes, focus: int | None = None) -> bytes:
    """Data with 1 to 4 places changed, all among its first `focus` bytes."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(max(min(len(spoilt), focus or len(spoilt)), 1))
        here = slice(at, at)
        changes: list[Callable[[], None]] = [
            lambda at=at: spoilt.__setitem__(at, spoilt[at] ^ 1 << rng.randrange(8)),
            lambda at=at: spoilt.__setitem__(at, rng.choice(SYMBOLS)),
            lambda here=here: spoilt.__setitem__(here, rng.randbytes(rng.choice((1, 2, 8)))),
            lambda here=here: spoilt.__setitem__(here, rng.choice(PIECES)),
            lambda at=at, here=here: spoilt.__setitem__(here, spoilt[at : at + 40]),
            lambda at=at: spoilt.__delitem__(slice(at, at + rng.choice((1, 2, 9, 50)))),
            lambda at=at: spoilt.__delitem__(slice(at, None)),
        ]
        if spoilt:
            rng.choice(changes)()
    return bytes(spoilt)


def of_value(rng: random.Random, value: Any) -> bytes:
    """The JSON text of a value, a place or two of which is removed, renamed or evil."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(holder: Any) -> None:
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                walk(holder[key])

    walk(value)
    for _ in range(rng.choice((1, 1, 2))):
        holder, key = rng.choice(places)
        how = rng.randrange(8)
        if isinstance(holder, dict) and how < 2:
            old = holder.pop(key, None)
            holder |= {f"{key}x": old} if how else {}
        elif isinstance(holder, dict) or key < len(holder):
            holder[key] = rng.choice(EVIL)
    return json.dumps(value).encode()


def of_json(rng: random.Random, value: Any) -> bytes:
    """Either of the two above."""
    if rng.random() < 0.5:
        return of_value(rng, value)
    return of_bytes(rng, json.dumps(value).encode())


def of_json_lines(rng: random.Random, values: list[Any]) -> bytes:
    """JSON Lines, a line of which is spoilt, or all of them."""
    lines = [json.dumps(value).encode() for value in values]
    if rng.random() < 0.6:
        number = rng.randrange(len(lines))
        lines[number] = of_value(rng, values[number])
        return b"\n".join(lines) + b"\n"
    return of_bytes(rng, b"\n".join(lines) + b"\n")


def of_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header is spoilt, as bytes or as JSON of some length."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        return of_bytes(rng, data, 8 + size)
    header = of_value(rng, json.loads(data[8 : 8 + size]))
    length = rng.choice((len(header),) * 3 + (2**40, 2**63 - 1, 0, 5))
    return length.to_bytes(8, "little") + header + data[8 + size :]
