"""The tokenizer of a model directory, as the model was trained with it; no code of it is run."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from medusa_jax import json_files
from medusa_jax.data.gguf_tokenizer import load_gguf_tokenizer
from medusa_jax.errors import InputError
from medusa_jax.gguf_file import is_gguf

log = logging.getLogger(__name__)

LONGEST = int(1e9)  # the decoder checks lengths, with better words
_MODEL_OPTIONS = ("byte_fallback", "fuse_unk", "ignore_merges")  # of BPE


def load_tokenizer(directory: Path) -> Any:
    """A Hugging Face tokenizer whose pipeline is that of tokenizer.json, where there is any.

    transformers 5 takes some parts from the class that tokenizer_config.json names instead. Some
    of its releases lose the spaces of byte-level tokenizers so, and all write other tokens after
    a special token than Llama 2 was trained with.

    Args:
      directory: or a GGUF file.

    Raises:
      InputError: no tokenizer there that can be read without running code of the directory.
    """
    if is_gguf(directory):
        tokenizer = load_gguf_tokenizer(directory)
        tokenizer.model_max_length = LONGEST
        return tokenizer
    # transformers says on every start that it found no PyTorch, which we do not use.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    file = directory / "tokenizer.json"
    how = {} if file.is_file() else _sentencepiece_settings(directory)
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, **how
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{directory} holds no readable tokenizer: {reason}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{directory} holds a slow tokenizer; a tokenizer.json is needed")
    tokenizer.model_max_length = LONGEST
    if file.is_file() and (changed := restore(tokenizer.backend_tokenizer, file)):
        log.warning(
            "transformers %s changes the %s of %s; the file is followed",
            transformers.__version__,
            " and the ".join(changed),
            file,
        )
    return tokenizer


def restore(backend: Any, file: Path) -> list[str]:
    """Gives a tokenizer the pipeline of its tokenizer.json; returns which parts were others."""
    from tokenizers import Tokenizer

    parts = ("normalizer", "pre_tokenizer", "decoder")
    content = json_files.read_object(file)
    outline = {
        "version": "1.0",
        "added_tokens": [],
        "post_processor": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        **{part: content.get(part) for part in parts},
    }
    wanted = Tokenizer.from_str(json.dumps(outline))  # the vocabulary would take long
    changed = [part for part in parts if _state(wanted, part) != _state(backend, part)]
    for part in changed:
        setattr(backend, part, getattr(wanted, part))
    model, kept = backend.model, json_files.Fields(content, str(file)).inner("model")
    options = [name for name in _MODEL_OPTIONS if hasattr(model, name)]
    others = [name for name in options if getattr(model, name) != kept.flag(name)]
    for name in others:
        setattr(model, name, kept.flag(name))
    return changed + others


def _state(tokenizer: Any, part: str) -> bytes | None:
    value = getattr(tokenizer, part)
    return None if value is None else value.__getstate__()


def _sentencepiece_settings(directory: Path) -> dict[str, Any]:
    """What tokenizer.model of Llama 2 and Vicuna was trained with, where its config is silent.

    Their answers end in "</s>", after which the legacy tokenizer writes a space: "</s>", "▁USER".
    transformers 4 reads a silent config as legacy, transformers 5 does not.
    """
    config = directory / "tokenizer_config.json"
    settings = json_files.read_object(config) if config.is_file() else {}
    llama = str(settings.get("tokenizer_class")).startswith("Llama")
    return {"legacy": True} if llama and "legacy" not in settings else {}
