"""Numbers at their limits: logits that are not finite, cold temperatures, wide seeds, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import TinyModel
from helpers.texts import decode

from medusa_jax.decoding import decoder as module
from medusa_jax.decoding.acceptance import Lossless, Typical
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.sampling import row_keys, scaled, warp
from medusa_jax.decoding.step import finite
from medusa_jax.drafting.draft_model import DraftModel
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError

BUSHY = Tree.from_lists([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


def spoiled(params: dict, token: int, value: float) -> dict:
    """The same weights with a number in the embedding of one token."""
    embed = params["backbone"]["embed"]["embedding"].at[token, 0].set(value)
    return params | {"backbone": params["backbone"] | {"embed": {"embedding": embed}}}


def test_finite_docstring_example():
    rows = jnp.array([[1, -jnp.inf], [1, jnp.nan], [1, jnp.inf]])
    assert finite(rows).tolist() == [True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_ends_where_logits_stop_being_finite(tiny: TinyModel, value: float):
    """What was chosen before is kept; a row beside it, and a row that has ended, do not fail."""
    decoder = Decoder(tiny.config)
    prompts, limits = [[1, 5], [3, 9, 2], [1, 5]], [20, 20, 3]
    right = decode(decoder, tiny.params, prompts, max_new_tokens=limits)
    text, beside = right[0].token_ids, right[1].token_ids
    token = next(one for one in text[3:] if one not in text[:3] and one not in beside)
    params = spoiled(tiny.params, token, value)
    failed, other, ended = decode(decoder, params, prompts, max_new_tokens=limits)
    # The token itself was chosen from finite logits; those after it are not.
    chosen = text[: text.index(token) + 1]
    assert (failed.finish_reason, failed.token_ids) == ("failed", chosen)
    assert (other, ended) == (right[1], right[2])
    with pytest.raises(FloatingPointError, match=r"line 7: .* not finite after \d+ new tokens"):
        failed.check("line 7")
    other.check("line 8")
    # A guess may spoil a tree before its time, but makes no other text.
    decoder = Decoder(tiny.config, drafter_of_heads(tiny.heads, BUSHY))
    prompts = [[1, 5], [1, token], [1, 5]]
    early, at_once, _ = decode(decoder, params, prompts, max_new_tokens=limits)
    assert early.finish_reason == "failed"
    assert early.token_ids == chosen[: len(early.token_ids)]
    assert (at_once.finish_reason, at_once.token_ids) == ("failed", [])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Lossless, Typical])
def test_the_coldest_text_is_the_greedy_text(tiny: TinyModel, scheme):
    drafter = drafter_of_heads(tiny.heads, BUSHY)
    (greedy,) = decode(Decoder(tiny.config, drafter), tiny.params, [[1, 5]], max_new_tokens=40)
    decoder = Decoder(tiny.config, drafter, scheme(1e-40))
    (cold,) = decode(decoder, tiny.params, [[1, 5]], max_new_tokens=40)
    assert cold.token_ids == greedy.token_ids


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-38, 1e-20])
def test_cold_logits_stay_finite_and_apart(temperature: float):
    logits = jnp.array([[300.0, 299.9999, -40.0], [-1e4, -1e4 - 1, -2e4]])
    cold = np.asarray(scaled(logits, temperature))
    assert np.isfinite(cold).all() and (np.diff(cold) < -1e6).all()
    assert np.isfinite(warp(logits, temperature, top_p=0.9)).sum(axis=1).tolist() == [1, 1]


def test_seeds_of_64_bits_have_streams_of_their_own():
    data = lambda seed: np.asarray(jax.random.key_data(row_keys(seed, [(2, 3)]))).tobytes()  # noqa: E731
    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**63)]
    assert len({data(seed) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("seed", [0, 9, 2**31, 2**32 - 1])
def test_seeds_of_32_bits_keep_their_streams(seed: int):
    fold = jax.random.fold_in
    expected = fold(fold(jax.random.key(seed), 4), 7)
    np.testing.assert_array_equal(
        jax.random.key_data(row_keys(seed, [(4, 7)]))[0], jax.random.key_data(expected)
    )


def test_a_cache_beyond_the_memory_is_refused(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch):
    decoder = Decoder(tiny.config)
    row = module.row_bytes(decoder, tiny.params)
    cache = decoder.prefill(tiny.params, [[1]], max_new_tokens=1).cache
    assert row == sum(leaf.nbytes for leaf in cache.keys + cache.values)
    monkeypatch.setattr(module, "memory_bytes", lambda: 2 * row)
    decoder.prefill(tiny.params, [[1]] * 2, max_new_tokens=1)
    with pytest.raises(InputError, match=r"3 rows of 128 tokens needs .* GiB, but there are"):
        decoder.prefill(tiny.params, [[1]] * 3, max_new_tokens=1)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params)
    assert module.row_bytes(decoder, half) == row // 2


def test_a_draft_models_cache_counts(tiny: TinyModel):
    params = tiny.params | {"draft": tiny.params["backbone"]}
    decoder = Decoder(tiny.config, DraftModel(tiny.config, Tree.chain(3)))
    state = decoder.prefill(params, [[1]], max_new_tokens=1)
    caches = state.cache, state.draft.cache
    row = sum(leaf.nbytes for cache in caches for leaf in (*cache.keys, *cache.values))
    extra = state.draft.guesses.nbytes + state.draft.cache.length.nbytes
    assert module.row_bytes(decoder, params) == row + extra


def test_tokens_must_be_left(tiny: TinyModel):
    with pytest.raises(InputError, match="all 40 tokens of the vocabulary"):
        Decoder(tiny.config, suppress=tuple(range(40)))
    assert dataclasses.replace(Decoder(tiny.config), suppress=tuple(range(39))).suppress
