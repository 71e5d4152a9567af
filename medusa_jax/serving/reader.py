"""Prompts are read block by block, between steps of the rows that write."""

from medusa_jax.decoding.prompt_blocks import longest_block
from medusa_jax.serving.jobs import Row
from medusa_jax.serving.slots import Slots

OVERTAKE = 8  # short prompts that may go before a longer prompt
AGAIN = 8  # blocks of longer prompts after a row has ended, in which its user may ask again


class Reader:
    """Reads the prompts of a batch, about a block a call, so that rows that write go on soon."""

    def __init__(self, batch: Slots) -> None:
        self._batch, self._oldest, self._overtaken = batch, False, 0
        self._alone = AGAIN  # blocks of longer prompts since a row wrote

    def read(self, rows: dict[int, Row]) -> int:
        """Reads blocks into the rows, by their slots, oldest first; how many rows write then.

        A prompt of a block overtakes longer ones, but no more than OVERTAKE in a row. Of longer
        prompts, the oldest and the shortest take turns. So none waits for ever. While more rows
        wait than write, short prompts are read on: a step of few rows takes nearly as long as that
        of many. A row that can begin does not wait for a block of a longer prompt. Such blocks are
        small beside rows that write, and soon after: who comes next waits for their end.
        """
        unread = {slot: row for slot, row in rows.items() if row.unread}
        tokens, waiting = 0, len(unread)
        self._alone = 0 if waiting < len(rows) else self._alone + 1
        while unread:
            slot = min(unread, key=lambda slot: (is_long(unread[slot]), unread[slot].unread))
            short = not is_long(unread[slot])
            waited_for = not short and (self._alone < AGAIN or len(unread) < waiting)
            full = tokens >= (1 if waited_for else longest_block())
            if full and not (short and 2 * len(unread) > len(rows)):
                break
            if not short or self._overtaken >= OVERTAKE:
                self._oldest, self._overtaken = not self._oldest or short, 0
                slot = next(iter(unread)) if self._oldest else slot
            else:
                self._overtaken += 1
            row = unread[slot]
            count = self._batch.read(row.job, slot, row.read, waited_for=waited_for)
            row.read, tokens = row.read + count, tokens + count
            if not row.unread:
                del unread[slot]
        return len(rows) - len(unread)


def is_long(row: Row) -> bool:
    """Whether its prompt has more tokens than a block."""
    return len(row.job.prompt_ids) > longest_block()
