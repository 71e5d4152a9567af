"""A small tokenizer with any template, and files of records."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizers import byte_level

from medusa_jax.data.corpus import Corpus
from medusa_jax.data.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of a few hundred tokens."""
    return byte_level(tmp_path_factory.mktemp("bytes"), ("<|im_start|>", "<|im_end|>"))


@pytest.fixture(scope="module")
def make(directory: Path):
    """A tokenizer with a template: a built-in name, the template itself, or none."""

    def text(template: str | None) -> ChatTokenizer:
        if template is None or "{" not in template:
            return ChatTokenizer(directory, template=template)
        file = directory / "own.jinja"
        file.write_text(template)
        return ChatTokenizer(directory, template=str(file))

    return text


@pytest.fixture
def corpus(tmp_path: Path):
    def of(*records: dict[str, Any], **how: str) -> Corpus:
        file = tmp_path / "a.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return Corpus([str(file)], **how)

    return of
