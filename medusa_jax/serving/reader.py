"""Prompts are read block by block, between steps of the rows that write."""

from medusa_jax.decoding.prompt_blocks import longest_block
from medusa_jax.serving.jobs import Row
from medusa_jax.serving.slots import Slots


class Reader:
    """Reads the prompts of a batch, about a block a call, so that rows that write go on soon."""

    def __init__(self, batch: Slots) -> None:
        self._batch, self._oldest = batch, False

    def read(self, rows: dict[int, Row]) -> int:
        """Reads blocks into the rows, by their slots, oldest first; how many rows write then.

        The oldest prompt and the shortest take turns: short prompts overtake long ones, and none
        waits for ever. While more rows wait than write, short prompts are read on: a step of few
        rows takes nearly as long as that of many.
        """
        unread = {slot: row for slot, row in rows.items() if row.unread}
        tokens = 0
        while unread:
            slot = min(unread, key=lambda slot: unread[slot].unread)
            if tokens < longest_block():
                self._oldest = not self._oldest
                slot = next(iter(unread)) if self._oldest else slot
            elif 2 * len(unread) <= len(rows) or unread[slot].unread > longest_block():
                break
            row = unread[slot]
            count = self._batch.read(row.job, slot, row.read)
            row.read, tokens = row.read + count, tokens + count
            if not row.unread:
                del unread[slot]
        return len(rows) - len(unread)
