"""Prompts are read block by block, between steps of the rows that write."""

from medusa_jax.decoding.prompt_blocks import longest_block
from medusa_jax.serving.jobs import Row
from medusa_jax.serving.slots import Slots

OVERTAKE = 8  # short prompts that may go before a longer prompt


class Reader:
    """Reads the prompts of a batch, about a block a call, so that rows that write go on soon."""

    def __init__(self, batch: Slots) -> None:
        self._batch, self._oldest, self._overtaken = batch, False, 0

    def read(self, rows: dict[int, Row]) -> int:
        """Reads blocks into the rows, by their slots, oldest first; how many rows write then.

        A prompt of a block overtakes longer ones, but no more than OVERTAKE in a row. Of longer
        prompts, the oldest and the shortest take turns. So none waits for ever. While more rows
        wait than write, short prompts are read on: a step of few rows takes nearly as long as that
        of many. A row that can begin does not wait for a block of a longer prompt.
        """
        unread = {slot: row for slot, row in rows.items() if row.unread}
        tokens, waiting = 0, len(unread)
        while unread:
            slot = min(unread, key=lambda slot: unread[slot].unread)
            short = unread[slot].unread <= longest_block()
            begins, many = len(unread) < waiting, 2 * len(unread) > len(rows)
            if (begins and not short) or (tokens >= longest_block() and not (short and many)):
                break
            if not short or self._overtaken >= OVERTAKE:
                self._oldest, self._overtaken = not self._oldest or short, 0
                slot = next(iter(unread)) if self._oldest else slot
            else:
                self._overtaken += 1
            row = unread[slot]
            count = self._batch.read(row.job, slot, row.read)
            row.read, tokens = row.read + count, tokens + count
            if not row.unread:
                del unread[slot]
        return len(rows) - len(unread)
