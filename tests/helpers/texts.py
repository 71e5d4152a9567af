"""Texts of a decoder, in one call."""

from collections.abc import Sequence
from typing import Any

from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import Output, outputs


def decode(
    decoder: Decoder, params: Any, prompts: Sequence[Sequence[int]], **settings: Any
) -> list[Output]:
    """What it writes after prompts, with settings of its prefill."""
    return outputs(decoder.generate(params, decoder.prefill(params, prompts, **settings)))
