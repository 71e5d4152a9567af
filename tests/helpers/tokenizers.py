"""Small tokenizers made on the spot, of the two families that models have."""

import json
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = ["Well, Hello there. Good morning,\n\nonce upon  a time 123. hi there, I'll say."] * 9


def byte_level(directory: Path, special: tuple[str, ...] = (), vocab_size: int = 400) -> Path:
    """Saves a tokenizer as Llama 3's and Qwen's: tokens are bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _save(tokenizer, directory, [*SPECIAL, *special], vocab_size, alphabet)


def byte_fallback(directory: Path, special: tuple[str, ...] = ()) -> Path:
    """Saves a tokenizer as Llama 2's: words with their space before, and bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    return _save(tokenizer, directory, [*SPECIAL, *special], 400, [], pieces)


def _save(
    tokenizer: Tokenizer,
    directory: Path,
    special: list[str],
    vocab_size: int,
    alphabet: list[str],
    pieces: list[str] | None = None,
) -> Path:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *(pieces or [])],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]  # bytes are usual tokens
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    made.save_pretrained(directory)
    return directory
