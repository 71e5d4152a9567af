"""Repetition penalty: equal to transformers' in each node of a tree, in texts and in draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import hugging_face
from helpers.models import TinyModel
from helpers.trees import tables
from transformers import RepetitionPenaltyLogitsProcessor

from medusa_jax.decoding.acceptance import Greedy, Lossless
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.repetition import Repetition, marked, penalized, penalties
from medusa_jax.decoding.sampling import row_keys
from medusa_jax.decoding.state import Output, outputs
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError

BUSHY = Tree.from_lists([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
TREES = {"plain": Tree(), "static": BUSHY, "grown": DynamicTree(6, 3, 4)}
PROMPTS = [[1, 5], [7], [3, 9, 2, 30, 4, 11, 6], list(range(20))]


def decode(model, tree, prompts, scheme=None, suppress=(), **settings) -> list[Output]:
    drafter = drafter_of_heads(model.heads, tree)
    decoder = Decoder(model.config, drafter, scheme or Greedy(), suppress=suppress)
    return outputs(
        decoder.generate(model.params, decoder.prefill(model.params, prompts, **settings))
    )


def test_docstring_examples():
    seen = marked(jnp.zeros((1, 4), bool), jnp.array([[2, 0, 1]]), jnp.array([2]))
    assert seen.tolist() == [[True, False, True, False]]
    assert penalized(jnp.array([[3.0, -1.0]]), jnp.array([2.0])).tolist() == [[1.5, -2.0]]
    assert penalties((1.0, 1), 2) is None


@pytest.mark.slow
def test_each_node_sees_the_prompt_and_its_own_path():
    """Random logits, some -inf; tokens repeat in the prompt, on the path and beside it."""
    rng = np.random.default_rng(0)
    batch, vocab, tree = 3, 11, tables(BUSHY)
    prompts = rng.integers(vocab, size=(batch, 5))
    lengths = np.array([5, 2, 3])
    tokens = rng.integers(vocab, size=(batch, BUSHY.size))
    logits = rng.normal(0, 3, (batch, BUSHY.size, vocab)).astype(np.float32)
    logits[:, :, 4] = -np.inf
    penalty = np.array([1.3, 0.7, 1.0], np.float32)
    rows = Repetition.of_prompts(
        jnp.asarray(penalty), jnp.asarray(prompts), jnp.asarray(lengths), vocab
    )
    found = np.asarray(rows.in_tree(tree, jnp.asarray(tokens), jnp.asarray(logits)))
    for row, node in np.ndindex(batch, BUSHY.size):
        path = [tokens[row, slot] for slot in tree.ancestors[0, node] if slot >= 0]
        text = torch.tensor([[*prompts[row, : lengths[row]], *path]])
        process = RepetitionPenaltyLogitsProcessor(float(penalty[row]))
        expected = process(text, torch.from_numpy(logits[row, node])[None])[0]
        np.testing.assert_allclose(found[row, node], expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "babyllama105", "poem"])
def test_greedy_text_equals_hugging_face(shared, name):
    """A single prompt and a batch of eight, with trees and without, until EOS."""
    directory = shared / "models" / name
    prompts, suppress = hugging_face.prompts(directory), hugging_face.SUPPRESS[name]
    settings = {"suppress_tokens": list(suppress) or None}
    free = hugging_face.greedy(directory, prompts[1:3], 40, **settings)
    expected = hugging_face.greedy(directory, prompts, 40, repetition_penalty=1.3, **settings)
    assert free != expected[1:3]
    model = hugging_face.with_heads(directory)
    cases = [("plain", 1), ("static", 8)]
    if name == "stories260K":
        cases += [("static", 1), ("grown", 8)]
    for tree, rows in cases:
        results = decode(
            model,
            TREES[tree],
            prompts[:rows],
            suppress=suppress,
            max_new_tokens=40,
            stop_ids=model.stop_ids,
            repetition_penalty=1.3,
        )
        assert [result.token_ids for result in results] == expected[:rows], (tree, rows)


@pytest.mark.slow
def test_rows_have_penalties_of_their_own(tiny: TinyModel):
    """Each row is as alone, a row of penalty 1 as without any, and drawn as with another tree."""
    each, keys = [1.0, 1.4, 2.0, 0.5], row_keys(3, [(row, 0) for row in range(4)])
    how = {"scheme": Lossless(0.8, top_k=20), "max_new_tokens": 30}
    texts = decode(tiny, BUSHY, PROMPTS, repetition_penalty=each, keys=keys, **how)
    plain = decode(tiny, Tree(), PROMPTS, repetition_penalty=each, keys=keys, **how)
    assert [text.token_ids for text in texts] == [text.token_ids for text in plain]
    assert max(max(text.tokens_per_step) for text in texts) > 1
    for row, text in enumerate(texts[:2]):
        settings, one = how | {"keys": keys[row : row + 1]}, PROMPTS[row : row + 1]
        (free,) = decode(tiny, BUSHY, one, **settings)
        assert (text == free) == (each[row] == 1)
    (alone,) = decode(tiny, BUSHY, one, repetition_penalty=each[row], **settings)
    assert text == alone


@pytest.mark.slow
def test_another_penalty_compiles_nothing_and_none_is_as_before(tiny: TinyModel):
    decoder = Decoder(tiny.config)
    prefill = lambda penalty: decoder.prefill(  # noqa: E731
        tiny.params, [[1, 5]], max_new_tokens=4, repetition_penalty=penalty
    )
    assert prefill(1.0).repetition is None
    decoder.generate(tiny.params, prefill(1.5))
    compiled: list[str] = []
    listener = lambda event, seconds, **_: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        decoder.generate(tiny.params, prefill(1.2))
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [event for event in compiled if "backend_compile" in event]


@pytest.mark.parametrize("penalty", [0, -1.0, float("nan"), float("inf"), 1e-50])
def test_a_penalty_that_means_nothing_is_refused(penalty: float):
    with pytest.raises(InputError, match="repetition_penalty must be > 0 and finite"):
        penalties([1.0, penalty], 2)
