"""The tokenizer inside a GGUF file, built as transformers builds it, but without PyTorch."""

import importlib
import os
from pathlib import Path
from typing import Any

from medusa_jax.errors import InputError
from medusa_jax.gguf_file import GgufFile, open_gguf

_SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_TOKENIZER = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "add_space_prefix": "add_prefix_space",
}


def load_gguf_tokenizer(path: Path) -> Any:
    """A Hugging Face tokenizer with the file's vocabulary, special tokens and chat template.

    Raises:
      InputError: the file holds none, or of a type that transformers does not know.
    """
    file = open_gguf(path)
    try:
        return _built(file)
    except Exception as error:  # of transformers, for what the file says
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} holds no readable tokenizer: {reason}") from None


def save_tokenizer(path: Path, directory: Path) -> None:
    """Writes the tokenizer of a GGUF file as files of a Hugging Face directory."""
    load_gguf_tokenizer(path).save_pretrained(str(directory))


def _built(file: GgufFile) -> Any:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    fields = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in file.fields.items()
        if name.startswith("tokenizer.ggml.")
    }
    ids = {
        short: fields[f"{name}_token_id"]
        for name, short in _SPECIAL.items()
        if f"{name}_token_id" in fields
    }
    content = {ours: fields[name] for name, ours in _TOKENIZER.items() if name in fields}
    content |= {f"{short}_token_id": token for short, token in ids.items()}
    backend, more = _convert()(file.architecture, content)
    tokens = fields["tokens"]
    special = {f"{short}_token": tokens[token] for short, token in ids.items()}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **(more | special))
    made.chat_template = file.fields.get("tokenizer.chat_template")
    return made


def _convert() -> Any:
    """transformers' own conversion, which its releases keep in different modules."""
    for place in ("gguf.gguf_tokenizer_mapping", "ggml"):
        try:
            module = importlib.import_module(f"transformers.integrations.{place}")
        except ImportError:
            continue
        if convert := getattr(module, "convert_gguf_tokenizer", None):
            return convert
    raise ImportError("this release of transformers converts no GGUF tokenizer; install another")
