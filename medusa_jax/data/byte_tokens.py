"""Byte tokens whose bytes are no character, made whole: for text from ids as they come."""

import codecs
from collections.abc import Iterable, Iterator
from typing import Any

PIECES = [f"<0x{byte:02X}>" for byte in range(256)]  # of bytes, in sentencepiece vocabularies


class ByteTokens:
    """Mends the byte tokens of byte-fallback tokenizers (Llama 2, Mistral).

    Their decoder reads a run of byte tokens at once, and a broken byte spoils what was said of
    the run. Here broken bytes become the tokens of U+FFFD, so that each run is whole:

        E6 9C 88   ->  E6 9C 88               "月"
        0A F0 41   ->  0A, EF BF BD, 41       "\\n\\ufffdA"
    """

    def __init__(self, backend: Any) -> None:
        """Takes a tokenizer of the library `tokenizers`."""
        decoder = backend.decoder.__getstate__() if backend.decoder else b""
        ids = [backend.token_to_id(piece) for piece in PIECES]
        mends = b'"ByteFallback"' in decoder and None not in ids
        self._byte_of = {token_id: byte for byte, token_id in enumerate(ids)} if mends else {}
        self._id_of = ids
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def whole(self, token_ids: Iterable[int]) -> Iterator[int]:
        """The ids with broken bytes mended; bytes of an unfinished character are kept back."""
        for token_id in map(int, token_ids):
            byte = self._byte_of.get(token_id)
            if byte is None:
                yield from self.rest()
                yield token_id
            else:
                yield from self._ids(self._characters.decode(bytes([byte])))

    def rest(self) -> Iterator[int]:
        """The ids of a character that was not finished."""
        if self._byte_of:
            yield from self._ids(self._characters.decode(b"", final=True))

    def _ids(self, text: str) -> Iterator[int]:
        return (self._id_of[byte] for byte in text.encode())
