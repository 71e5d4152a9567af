"""The bytes of tokens make up the text that they were made from."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import tokenizers

from medusa_jax.data.pretrained import load_tokenizer
from medusa_jax.data.token_bytes import TokenBytes

TEXT = "Hello there. 123\n\n café 月 🙂"


@pytest.mark.parametrize(
    ("make", "before"), [(tokenizers.byte_level, ""), (tokenizers.byte_fallback, " ")]
)
def test_bytes_make_up_the_text(tmp_path: Path, make: Callable[[Path], Path], before: str):
    tokenizer = load_tokenizer(make(tmp_path))
    tokens = TokenBytes(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(tokens.of(token) for token in ids) == (before + TEXT).encode()
    assert tokens.of(tokenizer.convert_tokens_to_ids("</s>")) == b"</s>"
    assert tokens.of(10**6) == b""
