"""Many documents in rows of one length, none of which sees, or is asked about, another."""

import bisect
import dataclasses
import json
import zlib
from collections.abc import Sequence

import numpy as np

from medusa_jax.data.encoding import Encoded
from medusa_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of T tokens, stored as the pieces of documents that they hold.

    Attributes:
      pieces: documents, cut to at most T tokens.
      plan: for each row, the pieces in it, in order.
      length: T.
    """

    pieces: Sequence[Encoded]
    plan: Sequence[Sequence[int]]
    length: int

    def __len__(self) -> int:
        return len(self.plan)

    def fingerprint(self) -> int:
        """A number that other tokens, targets or rows would almost surely change."""
        found = zlib.crc32(json.dumps([list(map(int, row)) for row in self.plan]).encode())
        for piece in self.pieces:
            found = zlib.crc32(piece.learnt.tobytes(), zlib.crc32(piece.ids.tobytes(), found))
        return found

    def most_frequent(self, count: int) -> list[int]:
        """The `count` tokens that are learnt most often, in order of their ids.

        Of equally frequent ones the lower id is taken; targets 5 5 9 9 9 4, count 2 -> 5, 9.
        """
        learnt = np.concatenate([piece.ids[piece.learnt] for piece in self.pieces])
        often = np.bincount(learnt, minlength=count)
        return sorted(np.argsort(-often, kind="stable")[:count].tolist())

    def arrays(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows as arrays [B, T]: see `row`. Number -1 is an empty row."""
        plans = [self.plan[r] if r >= 0 else () for r in rows]
        made = [row([self.pieces[i] for i in plan], self.length) for plan in plans]
        return {key: np.stack([one[key] for one in made]) for key in made[0]}


def row(pieces: Sequence[Encoded], length: int) -> dict[str, np.ndarray]:
    """One row [T].

    Pieces (5 6 7) and (8 9) in a row of 6, only 6, 7 and 9 learnt:

        tokens     5 6 7 8 9 0
        segments   1 1 1 2 2 0     0 is padding
        positions  0 1 2 0 1 0
        learnt     0 1 1 0 1 0

    Returns:
      `tokens`, `segments`, `positions` (int32) and `learnt` (bool): whether the
      token is a target.
    """
    out = {key: np.zeros(length, np.int32) for key in ("tokens", "segments", "positions")}
    learnt, start = np.zeros(length, bool), 0
    for number, piece in enumerate(pieces, start=1):
        stop = start + len(piece.ids)
        out["tokens"][start:stop] = piece.ids
        out["segments"][start:stop] = number
        out["positions"][start:stop] = np.arange(len(piece.ids))
        learnt[start:stop] = piece.learnt
        start = stop
    return out | {"learnt": learnt}


def fit(documents: Sequence[Encoded], length: int, sources: str) -> list[Encoded]:
    """Cuts documents to pieces of at most `length` tokens that have something to learn.

    A text of which everything is learnt goes on in a next piece; a conversation is cut off.

    Raises:
      InputError: nothing learnt is left; names `sources`.
    """
    pieces = []
    for document in documents:
        whole = len(document.ids) and document.learnt[1:].all()
        last = len(document.ids) if whole else min(length, len(document.ids))
        for start in range(0, last, length):
            ids, learnt = (
                array[start : min(start + length, last)]
                for array in (document.ids, document.learnt)
            )
            if learnt[1:].any():  # a first token has nothing before it to be learnt from
                pieces.append(Encoded(ids, learnt, document.origin))
    if not pieces:
        longest = max((len(document.ids) for document in documents), default=0)
        raise InputError(
            f"{sources}: of {len(documents)} documents none has an assistant's token left within "
            f"data.sequence_length {length} (the longest has {longest} tokens)"
        )
    return pieces


def pack(pieces: Sequence[Encoded], length: int, *, packing: bool, seed: int) -> Rows:
    """Puts pieces into rows: the longest first, each where it leaves least room (best fit).

    Rows come out in random order, deterministic in the arguments. Without
    `packing`, one piece a row.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pieces))
    if not packing:
        return Rows(pieces, [[int(i)] for i in order], length)
    sizes = np.array([len(piece.ids) for piece in pieces])
    plan: list[list[int]] = []
    rooms: list[int] = []  # tokens still free in some row, each number once, ascending
    rows: dict[int, list[int]] = {}  # those numbers -> rows
    for i in order[np.argsort(-sizes[order], kind="stable")].tolist():
        size = int(sizes[i])
        place = bisect.bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            number = rows[room].pop()
            if not rows[room]:
                del rooms[place], rows[room]
            plan[number].append(i)
        else:
            room, number = length, len(plan)
            plan.append([i])
        left = room - size
        if left not in rows:
            bisect.insort(rooms, left)
        rows.setdefault(left, []).append(number)
    return Rows(pieces, [plan[number] for number in rng.permutation(len(plan))], length)
