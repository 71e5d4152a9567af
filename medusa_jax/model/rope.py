"""Rotary frequencies, and how long-context models stretch them.

Each scaling is what transformers' `modeling_rope_utils.py` computes under that name.
Its `frequencies` are radians per position of each rotated pair, float32 [C / 2].
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medusa_jax.errors import InputError
from medusa_jax.json_files import Fields

MOST_FACTOR = 1e6


def plain_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """Frequencies of the pretraining length: theta^(-2 i / C) of pair i.

    theta 100, head_dim 4 -> (1, 0.1).
    """
    return 1 / _periods(theta, head_dim)


def _periods(theta: float, head_dim: int) -> np.ndarray:
    """Positions per radian of each pair, float32 [C / 2].

    Powers in float64 round to those of PyTorch. The last bit of a frequency matters after 100,000
    positions.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(theta, exponents, dtype=np.float64).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
    """All frequencies are divided by `factor`."""

    factor: float
    amplitude: ClassVar[float] = 1.0  # of cos and sin

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        return plain_frequencies(theta, head_dim) / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Fast frequencies stay, slow ones are divided, and a smooth ramp lies between.

    Attributes:
      factor: what slow frequencies are divided by.
      original_context: tokens of the pretraining length.
      low_freq_factor, high_freq_factor: turns within the original context, below which a
        frequency is divided, and above which it stays.
    """

    factor: float
    original_context: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    amplitude: ClassVar[float] = 1.0

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        plain = plain_frequencies(theta, head_dim)
        turns = self.original_context * plain / (2 * np.pi)
        ramp = self.high_freq_factor - self.low_freq_factor
        keep = np.clip((turns - self.low_freq_factor) / ramp, 0.0, 1.0)
        return (plain * (keep + (1 - keep) / self.factor)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071): a ramp over the pairs, and larger cosines and sines.

    Attributes:
      factor: what slow frequencies are divided by.
      original_context: tokens of the pretraining length.
      beta_fast, beta_slow: turns within the original context at the ends of the ramp.
      amplitude: what cos and sin are multiplied by, so that attention stays as sharp.
      truncate: the ends of the ramp are rounded outward to whole pairs.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    amplitude: float = 1.0
    truncate: bool = True

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        def pair(turns: float) -> float:
            """The pair, a fraction too, that turns so often within the original context."""
            ratio = self.original_context / (turns * 2 * math.pi)
            return head_dim * math.log(ratio) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low or 0.001
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / width
        keep = 1 - np.clip(ramp, 0.0, 1.0)
        periods = _periods(theta, head_dim)
        return 1 / (np.float32(self.factor) * periods) * (1 - keep) + 1 / periods * keep


@dataclasses.dataclass(frozen=True)
class DynamicNTK:
    """Theta grows with the text, once it is longer than the original context.

    A prompt is rotated by the theta of its whole length. Each later token is rotated by the
    theta of the text that ends with it, and keeps that in the cache. This is what transformers'
    `generate` does with a single text and a new model.

    Attributes:
      factor: how fast theta grows.
      original_context: tokens of the pretraining length.
    """

    factor: float
    original_context: int
    amplitude: ClassVar[float] = 1.0

    def frequencies_at(
        self, theta: float, head_dim: int, lengths: Int[Array, "*dims"]
    ) -> Float[Array, "*dims c"]:
        """Frequencies for texts of these lengths."""
        reach = jnp.maximum(lengths, self.original_context).astype(jnp.float32)
        growth = self.factor * reach / self.original_context - (self.factor - 1)
        grown = theta * growth ** (head_dim / (head_dim - 2))
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        return 1.0 / grown[..., None] ** exponents


RopeScaling = Linear | Llama3 | Yarn | DynamicNTK


def read_rope(fields: Fields, head_dim: int, context: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from transformers 5's `rope_parameters` or 4's two separate keys.

    Args:
      fields: of `config.json`.
      context: its `max_position_embeddings`, the original context where none is named.

    Raises:
      InputError: a kind or a value that is not supported; names file and field.
    """
    keys = (key for key in ("rope_scaling", "rope_parameters") if fields.content.get(key))
    rope = fields.inner(next(keys, "rope_scaling"))
    if any(isinstance(value, dict) for value in rope.content.values()):
        raise InputError(f"{rope.origin}: settings of their own for some layers are not supported")
    outer = fields.number("rope_theta", 10000.0, least=1, most=1e30)
    theta = rope.number("rope_theta", outer, least=1, most=1e30)
    if any(place.number("partial_rotary_factor", 1.0) != 1.0 for place in (rope, fields)):
        raise InputError(
            f"{fields.origin}: a 'partial_rotary_factor' other than 1.0 is not supported"
        )
    kind = rope.text("rope_type", "") or rope.text("type", "") or "default"
    if kind == "default":
        return theta, None
    readers = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "dynamic": _dynamic}
    if kind not in readers:
        raise InputError(
            f"{rope.origin}: rope type {kind!r} is not supported; supported: default, "
            f"{', '.join(readers)}"
        )
    # Phi's place of the same number, which transformers prefers.
    original = rope.integer("original_max_position_embeddings", context)
    original = fields.integer("original_max_position_embeddings", original)
    scaling = readers[kind](rope, original, context)
    if kind == "yarn" and theta == 1:
        raise InputError(f"{rope.origin}: YaRN needs a 'rope_theta' above 1")
    if kind == "dynamic" and head_dim < 4:
        raise InputError(f"{rope.origin}: dynamic NTK needs a head_dim of 4 or more")
    return theta, scaling


def stretched_context(context: int, scaling: RopeScaling | None) -> int:
    """Tokens that a model takes whose `max_position_embeddings` is `context`.

    Some files count the stretch of YaRN in it, and others do not.
    """
    if not isinstance(scaling, Yarn | DynamicNTK):
        return context
    return max(context, min(int(scaling.factor * scaling.original_context), 2**31 - 1))


def _factor(rope: Fields) -> float:
    return rope.number("factor", above=0, most=MOST_FACTOR)


def _linear(rope: Fields, original: int, context: int) -> Linear:
    return Linear(_factor(rope))


def _dynamic(rope: Fields, original: int, context: int) -> DynamicNTK:
    # It counts from max_position_embeddings, whatever else is named.
    return DynamicNTK(rope.number("factor", least=1, most=MOST_FACTOR), context)


def _llama3(rope: Fields, original: int, context: int) -> Llama3:
    low = rope.number("low_freq_factor", above=0)
    return Llama3(_factor(rope), original, low, rope.number("high_freq_factor", above=low))


def _yarn(rope: Fields, original: int, context: int) -> Yarn:
    factor = context / original if rope.content.get("factor") is None else _factor(rope)
    mscale, all_dim = (rope.number(key, 0.0, least=0) for key in ("mscale", "mscale_all_dim"))

    def sharpness(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    amplitude = sharpness(mscale) / sharpness(all_dim) if mscale and all_dim else sharpness(1)
    return Yarn(
        factor,
        original,
        beta_fast=rope.number("beta_fast", 0.0, least=0) or 32.0,
        beta_slow=rope.number("beta_slow", 0.0, least=0) or 1.0,
        amplitude=rope.number("attention_factor", amplitude, above=0),
        truncate=rope.flag("truncate", True),
    )
