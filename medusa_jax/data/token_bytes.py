"""The bytes that a token stands for by itself."""

from typing import Any

from medusa_jax.data.byte_tokens import PIECES

SPACE = "\u2581"  # of sentencepiece vocabularies


class TokenBytes:
    """Token ids to bytes, whose sequence is the text: the token of half a character has half of it.

    Byte-level and sentencepiece vocabularies are read piece by piece. Of others, a token's bytes
    are those of its text alone.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Takes a Hugging Face tokenizer."""
        decoder = tokenizer.backend_tokenizer.decoder
        kind = decoder.__getstate__().decode() if decoder else ""
        self._tokenizer = tokenizer
        self._byte_level = '"ByteLevel"' in kind
        self._sentencepiece = SPACE in kind or "\\u2581" in kind or '"Metaspace"' in kind
        self._fallback = '"ByteFallback"' in kind
        self._added = {number: text for text, number in tokenizer.get_added_vocab().items()}
        self._known: dict[int, bytes] = {}

    def of(self, token_id: int) -> bytes:
        """The bytes of a token; those of a special token are its name's."""
        if token_id not in self._known:
            self._known[token_id] = self._read(token_id)
        return self._known[token_id]

    def _read(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # the model knows more tokens than its tokenizer
            return b""
        if self._fallback and piece in PIECES:
            return bytes([PIECES.index(piece)])
        if token_id in self._added:
            return self._added[token_id].encode()
        if self._byte_level and _BYTES.keys() >= set(piece):
            return bytes(_BYTES[character] for character in piece)
        if self._sentencepiece:
            return piece.replace(SPACE, " ").encode()
        return self._tokenizer.decode([token_id]).encode()


def _byte_characters() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with: "A" -> 65, "\u0120" -> 32."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_characters()
