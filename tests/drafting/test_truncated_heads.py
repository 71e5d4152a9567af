"""Heads that guess among some tokens only: the same heads with fewer rows, the same texts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import TinyModel, stacked

from medusa_jax.checkpoints.weight_layout import for_decoding
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.drafting.medusa_heads import HeadsConfig, rows_of, top_guesses
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.training.objective import Objective
from medusa_jax.training.settings import Config, Heads
from medusa_jax.training.weights import heads_shape
from medusa_jax.tuning.head_ranks import replayed

PROMPTS = [[1, 5, 9, 3], [2, 2, 7]]


def truncated(tiny: TinyModel, token_map: list[int], *, shared: bool = False) -> TinyModel:
    """The same model, its heads cut to rows of `token_map`; `shared`, without rows of theirs."""
    ids = jnp.array(token_map, jnp.int32)
    heads: dict[str, Any] = {"token_map": ids, "block_0": tiny.params["heads"]["block_0"]}
    if not shared:
        for i in range(tiny.heads.num_heads):
            heads[f"head_{i}"] = {"vocab": tiny.params["heads"][f"head_{i}"]["vocab"][ids]}
    shape = dataclasses.replace(tiny.heads, vocab_size=0, truncated=len(token_map), shared=shared)
    return dataclasses.replace(tiny, heads=shape, params=tiny.params | {"heads": heads})


def decoded(model: TinyModel, tree: Tree) -> list[tuple[list[int], list[int]]]:
    """(text, tokens of each step) of each prompt."""
    decoder = Decoder(model.config, drafter_of_heads(model.heads, tree))
    params = for_decoding(model.params, tied=model.config.tied)
    state = decoder.prefill(params, PROMPTS, max_new_tokens=24)
    done = outputs(decoder.generate(params, state))
    return [(one.token_ids, one.tokens_per_step) for one in done]


def test_the_examples_of_the_docstrings():
    token_map = jnp.array([7, 2, 9])
    ids, best = top_guesses([jnp.array([[0.1, 0.3, 0.2]])], 2, token_map)
    np.testing.assert_array_equal(ids, [[[2, 9]]])
    np.testing.assert_allclose(best, [[[0.3, 0.2]]], rtol=1e-6)
    np.testing.assert_array_equal(rows_of(jnp.array([9, 3, 7]), token_map, 10), [2, -1, 0])


@pytest.mark.slow
def test_decoding_as_whole_heads_and_never_another_text(tiny: TinyModel):
    """All tokens in another order take the same steps; fewer tokens, perhaps more of them."""
    tree = Tree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0)))
    order = np.random.default_rng(0).permutation(tiny.config.vocab_size).tolist()
    whole = decoded(tiny, tree)
    assert decoded(truncated(tiny, order), tree) == whole
    few = decoded(truncated(tiny, [3, 11, 4]), tree)
    assert [text for text, _ in few] == [text for text, _ in whole]


def test_a_tree_may_not_ask_for_more_ranks_than_there_are_tokens(tiny: TinyModel):
    few = truncated(tiny, [3, 11])
    with pytest.raises(InputError, match="2"):
        Decoder(few.config, drafter_of_heads(few.heads, Tree(((0,), (1,), (2,)))))


def test_ranks_of_tokens_that_cannot_be_said_come_last(tiny: TinyModel):
    tokens = jnp.array([[1, 5, 9, 3, 3, 9, 5, 1]])
    few = truncated(tiny, [3, 5])
    params = for_decoding(few.params, tied=few.config.tied)
    ranks = np.asarray(replayed(few.config, few.heads, (), params, tokens)[0])[0]
    asked = np.asarray(tokens)[0][2:8]  # head 1 at positions 0 to 5
    assert set(ranks[:6, 0][np.isin(asked, [3, 5])]) <= {0, 1}
    assert set(ranks[:6, 0][~np.isin(asked, [3, 5])]) == {few.config.vocab_size}


def batch_of(tokens: np.ndarray) -> dict[str, jax.Array]:
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "segments": jnp.ones(tokens.shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        "learnt": jnp.ones(tokens.shape, bool),
    }


def loss_of(model: TinyModel, batch: dict[str, jax.Array]) -> tuple[Any, Any]:
    objective = Objective(model.config, model.heads)
    params = stacked(model.params, model.config.num_layers)
    heads = dict(params["heads"])
    frozen = {"heads": {"token_map": heads.pop("token_map")}} if "token_map" in heads else {}
    return objective.loss(params | {"heads": heads}, frozen, batch, objective.counts(batch), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_the_loss_over_all_tokens_in_another_order_is_that_of_whole_heads(
    tiny: TinyModel, shared: bool
):
    rng = np.random.default_rng(0)
    order = rng.permutation(tiny.config.vocab_size).tolist()
    batch = batch_of(rng.integers(0, tiny.config.vocab_size, (2, 12)))
    whole = tiny
    if shared:
        heads = {"block_0": tiny.params["heads"]["block_0"]}
        whole = dataclasses.replace(
            tiny,
            heads=dataclasses.replace(tiny.heads, vocab_size=0, shared=True),
            params=tiny.params | {"heads": heads},
        )
    ours, terms = loss_of(truncated(tiny, order, shared=shared), batch)
    theirs, expected = loss_of(whole, batch)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), terms, expected)


@pytest.mark.slow
def test_targets_that_cannot_be_said_cost_nothing_and_are_misses(tiny: TinyModel):
    token_map = [3, 5, 8]
    rng = np.random.default_rng(1)
    batch = batch_of(rng.integers(0, tiny.config.vocab_size, (2, 12)))
    few = truncated(tiny, token_map)
    _, terms = loss_of(few, batch)
    sums, targets = terms.heads.heads[0], np.asarray(batch["tokens"])[:, 2:]
    assert float(sums.count) == targets.size
    assert float(sums.hits[1]) == np.isin(targets, token_map).sum()  # 3 tokens: always in the top 3
    never = batch_of(np.full((2, 12), 4))
    assert float(loss_of(few, never)[1].heads.heads[0].loss) == 0.0


def test_a_map_as_large_as_the_vocabulary_is_refused(tiny: TinyModel):
    config = Config(heads=Heads(truncated=tiny.config.vocab_size))
    with pytest.raises(InputError, match=r"heads\.truncated is .*expected fewer"):
        heads_shape(config, tiny.config)
    assert heads_shape(Config(heads=Heads(number=2, truncated=3)), tiny.config) == HeadsConfig(
        2, 1, tiny.config.hidden_size, tiny.config.vocab_size, False, 3
    )
