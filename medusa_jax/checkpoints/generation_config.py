"""What a model's own settings say about generation: `generation_config.json`, or `config.json`."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from medusa_jax import json_files
from medusa_jax.json_files import Fields, short

log = logging.getLogger(__name__)

# Settings of transformers' `generate` that change the text and that decoding does not apply,
# with the value that asks for nothing; None, False and empty values never do.
_IGNORED = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_decoder_ids": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0,
    "remove_invalid_values": None,
    "sequence_bias": None,
    "stop_strings": None,
    "token_healing": None,
    "top_h": None,
    "typical_p": 1,
    "watermarking_config": None,
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How a model asks to be decoded.

    Attributes:
      stop_ids: end-of-sequence tokens.
      suppress: tokens never to produce.
      repetition_penalty: 1 for none.
    """

    stop_ids: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()
    repetition_penalty: float = 1.0


def read_generation_config(
    directory: Path, config: dict[str, Any], vocab_size: int
) -> GenerationConfig:
    """The generation settings of a model directory; a warning names those that are not applied.

    As in transformers, `generation_config.json` counts alone where it is there. Its
    end-of-sequence tokens alone may be absent: then those of `config.json` count.

    Args:
      config: content of `config.json`.

    Raises:
      InputError: a setting has another type or is out of bounds; names file and field.
    """
    file = directory / "generation_config.json"
    own = legacy = Fields(config, str(directory / "config.json"))
    if file.is_file():
        own = Fields(json_files.read_object(file), str(file))
    if ignored := not_applied(own.content):
        log.warning("%s: settings that decoding does not apply: %s", own.origin, ignored)
    return GenerationConfig(
        stop_ids=own.integers("eos_token_id") or legacy.integers("eos_token_id"),
        suppress=own.integers("suppress_tokens", most=vocab_size - 1),
        repetition_penalty=own.number("repetition_penalty", 1.0, above=0),
    )


def not_applied(settings: Any) -> str:
    """Settings that ask for what decoding does not do.

    {"min_length": 5, "num_beams": 1, "top_k": 20} -> "min_length 5".
    """
    asked = [
        f"{name} {short(settings[name])}"
        for name, neutral in _IGNORED.items()
        if settings.get(name) and settings[name] != neutral
    ]
    return ", ".join(asked)
