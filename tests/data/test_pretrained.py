"""Tokenizers as their files say, whatever class a config names; no code of a directory is run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers.tokenizers import byte_fallback, byte_level
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.errors import InputError

TEXT = "Once  upon a\n\n  time, 12345 é 月</s>hi  there</s> I'll\t\n x"


def _configure(directory: Path, **settings: Any) -> Path:
    file = directory / "tokenizer_config.json"
    content = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return directory


@pytest.mark.parametrize(
    "name", ["LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", None]
)
@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_file_decides(tmp_path, make, name):
    directory = _configure(make(tmp_path), tokenizer_class=name)
    file = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = ChatTokenizer(directory)
    ids = text.tokenizer.encode(TEXT, add_special_tokens=False)
    assert ids == file.encode(TEXT, add_special_tokens=False).ids
    assert text.tokenizer.decode(ids) == file.decode(ids, skip_special_tokens=False)
    assert text.decode([], ids) == file.decode(ids)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_release_that_replaces_parts_is_named(tmp_path, monkeypatch, caplog, make):
    """As transformers 5.3.0, 5.10.2 and 5.15.1 do to byte-level tokenizers of Llama's class."""
    directory = make(tmp_path)
    load = transformers.AutoTokenizer.from_pretrained

    def broken(*args: Any, **how: Any) -> Any:
        tokenizer = load(*args, **how)
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.normalizer = normalizers.NFKC()
        return tokenizer

    expected = ChatTokenizer(directory).tokenizer.encode(TEXT)
    caplog.clear()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", broken)
    assert ChatTokenizer(directory).tokenizer.encode(TEXT) == expected
    assert "changes the normalizer and the pre_tokenizer of" in caplog.text


@pytest.mark.parametrize(("legacy", "expected"), [(None, "▁h"), (True, "▁h"), (False, "h")])
def test_sentencepiece_models_are_legacy_unless_they_say_otherwise(
    shared, tmp_path, legacy, expected
):
    """Vicuna's config is silent, and its training wrote a space after the end of each answer."""
    directory = Path(shutil.copytree(shared / "models/stories260K", tmp_path / "model"))
    text = ChatTokenizer(_configure(directory, legacy=legacy))
    assert text.tokenizer.tokenize("</s>hi")[1] == expected


def test_code_of_a_directory_is_not_run(tmp_path, monkeypatch):
    """Neither asked about: an answer of "y" waits on stdin."""
    directory = byte_level(tmp_path)
    (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    _configure(directory, tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError, match="holds no readable tokenizer") as raised:
        ChatTokenizer(directory)
    assert "\n" not in str(raised.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", "{", "\xff"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_broken_files(tmp_path, name, content):
    directory = byte_level(tmp_path)
    (directory / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=str(directory)) as raised:
        ChatTokenizer(directory)
    assert "\n" not in str(raised.value)
