"""The learned selector: its formula, its file, and that it shapes trees but never a text."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.head_files import (
    assert_same,
    edit_weights,
    error_of,
    heads_file,
    random_heads,
    stored,
)
from helpers.models import TINY, TinyModel, stacked

from medusa_jax.checkpoints.heads import head_tensors
from medusa_jax.checkpoints.load import load_model
from medusa_jax.checkpoints.weight_layout import for_decoding
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.drafting import selector
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.medusa_drafter import MedusaDraft, path_scores
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.param_paths import flat
from medusa_jax.training.objective import Objective

RANKS = 6
PROMPTS = [[1, 5, 9], [3], [7, 2, 11, 30, 4]]


def random_selector(heads: HeadsConfig, scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    width, of_heads = heads.hidden_size, heads.num_heads * RANKS
    shapes = {
        "before": {"weight": (RANKS, width)},
        "after": {"weight": (RANKS, width)},
        "context": {"weight": (of_heads, width), "bias": (of_heads,)},
    }
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(0, 0.3, shape), jnp.float32),
        shapes,
        is_leaf=lambda one: isinstance(one, tuple),
    )


def with_selector(tiny: TinyModel, **how: Any) -> TinyModel:
    learned = random_selector(tiny.heads, **how)
    return dataclasses.replace(
        tiny,
        heads=dataclasses.replace(tiny.heads, selector=RANKS),
        params=tiny.params | {"heads": tiny.params["heads"] | {"selector": learned}},
    )


def test_worked_examples():
    before, after = jnp.array([[1.0, 0], [0, 1]]), jnp.array([[1.0, 1]])
    found = selector.pairs(before, jnp.array([2.0, 3]), after)
    assert found.tolist() == [[2], [3]]
    scores, pairs = jnp.log(jnp.array([0.4, 0.2])), jnp.array([[0.0, np.log(2)], [0, 0]])
    found = jnp.exp(selector.links(scores, pairs))
    np.testing.assert_allclose(found, [[0.3, 0.3], [0.4, 0.2]], rtol=1e-5)  # (0 0): its own


@pytest.mark.slow
def test_path_scores_are_the_formula(tiny: TinyModel):
    """Head by head and guess by guess, in NumPy."""
    model, batch, ranks = with_selector(tiny), 2, 4
    rng = np.random.default_rng(3)
    guesses = rng.integers(0, TINY.vocab_size, (batch, 3, ranks))
    scores = np.log(rng.uniform(0.01, 0.2, guesses.shape)).astype(np.float32)
    hidden = rng.normal(0, 3, (batch, TINY.hidden_size)).astype(np.float32)
    root = rng.integers(0, TINY.vocab_size, batch)
    learned = model.params["heads"]["selector"]
    contexts = selector.contexts(learned, jnp.asarray(hidden), 3)
    draft = MedusaDraft(*map(jnp.asarray, (guesses, scores)), contexts)
    found = path_scores(model.params, draft, jnp.asarray(root))

    def normed(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True))

    table = np.asarray(model.params["backbone"]["embed"]["embedding"])
    p, q = (normed(table) @ np.asarray(learned[side]["weight"]).T for side in ("before", "after"))
    w = np.asarray(learned["context"]["weight"]).reshape(3, RANKS, -1)
    c = np.asarray(learned["context"]["bias"]).reshape(3, RANKS)
    for b in range(batch):
        for k in range(3):
            context = w[k] @ normed(hidden[b]) + c[k]
            for a in range(ranks):
                token = root[b] if k == 0 else guesses[b, k - 1, a]
                pairs = (p[token] * context * q[guesses[b, k]]).sum(-1) / np.sqrt(RANKS)
                shared_out = np.exp(scores[b, k]) * np.exp(pairs)
                expected = shared_out / shared_out.sum() * np.exp(scores[b, k]).sum()
                np.testing.assert_allclose(np.exp(found[b, k, a]), expected, rtol=1e-4)
    assert (np.asarray(found) <= 0).all()


def decoded(
    model: TinyModel, tree: Tree | DynamicTree, prompts: Any = PROMPTS
) -> list[tuple[list[int], list[int]]]:
    """(text, tokens of each step) of each prompt."""
    decoder = Decoder(model.config, drafter_of_heads(model.heads, tree), capacity=64)
    params = for_decoding(model.params, tied=model.config.tied)
    state = decoder.prefill(params, prompts, max_new_tokens=24)
    done = outputs(decoder.generate(params, state))
    return [(one.token_ids, one.tokens_per_step) for one in done]


@pytest.mark.slow
def test_a_selector_shapes_trees_and_leaves_the_texts(tiny: TinyModel):
    """A batch takes the steps of each row alone."""
    tree = DynamicTree(6, 3, 10)
    model, plain = with_selector(tiny, scale=3.0), decoded(tiny, Tree())
    selected = decoded(model, tree)
    assert [text for text, _ in selected] == [text for text, _ in plain]
    assert decoded(model, tree, PROMPTS[:1]) == selected[:1]
    assert decoded(tiny, tree) != selected


def test_it_is_kept_with_the_heads(saved: Path, tmp_path: Path, go: Any, caplog: Any):
    (tmp_path / "heads").mkdir()
    heads = heads_file(tmp_path / "heads", random_heads(3))
    before = load_model(saved, heads)
    learned = stored(random_selector(before.heads))
    names = {f"selector.{path.replace('/', '.')}": leaf for path, leaf in flat(learned).items()}
    edit_weights(heads, lambda tensors: tensors | names)
    model = load_model(saved, heads)
    assert model.heads == dataclasses.replace(before.heads, selector=RANKS)
    assert model.fingerprint != before.fingerprint  # other trees are tuned for it
    assert_same(flat(stored(model.params["heads"]["selector"])), flat(learned))
    assert load_model(saved, go(heads, "v1.0", as_is=True)).heads.selector == RANKS
    assert load_model(saved, go(heads, "vllm")).heads.selector == 0
    assert "is left out, since it has no place there" in caplog.text
    assert load_model(saved, go(heads, "v0.1")).heads.selector == 0
    assert "is left out; --as_is keeps it" in caplog.text
    assert head_tensors(heads, before.heads).keys() == flat(stored(before.params["heads"])).keys()
    other = dataclasses.replace(before.heads, selector=RANKS + 1)
    with pytest.raises(InputError, match=f"selector of {RANKS} ranks; set heads.selector={RANKS}$"):
        head_tensors(heads, other)
    last = "selector.after.weight"
    edit_weights(heads, lambda tensors: {n: t for n, t in tensors.items() if n != last})
    assert "missing selector.after.weight" in error_of(saved, heads)


@pytest.mark.slow
def test_it_learns_which_tokens_follow_and_the_heads_get_no_gradient_from_it(tiny: TinyModel):
    """Of a text in which each token has two successors, from hidden states that say nothing."""
    shape, tokens = (4, 24), np.zeros((4, 24), np.int32)
    rng = np.random.default_rng(0)
    tokens[:, 0] = rng.integers(0, 30, 4)
    for t in range(1, 24):
        tokens[:, t] = (7 * tokens[:, t - 1] + rng.integers(0, 2, 4)) % 30
    batch = {
        "tokens": jnp.asarray(tokens),
        "segments": jnp.ones(shape, jnp.int32),
        "learnt": jnp.ones(shape, bool),
        "hidden": jnp.asarray(rng.normal(0, 1, (*shape, TINY.hidden_size)), jnp.bfloat16),
    }
    params = stacked(tiny.params, 2)
    own = {f"head_{k}": {"block_0": params["heads"][f"head_{k}"]["block_0"]} for k in range(2)}
    token_map = jnp.arange(30, dtype=jnp.int32)
    frozen = {"backbone": params["backbone"], "heads": {"token_map": token_map}}
    heads = dataclasses.replace(tiny.heads, num_heads=2, shared=True, truncated=30)

    def gradient(heads: HeadsConfig, learnt: dict[str, Any]) -> Any:
        objective = Objective(TINY, heads)
        counts = objective.counts(batch)
        found = jax.grad(objective.loss, has_aux=True)
        return found({"heads": learnt}, frozen, batch, counts, 0.2, None, False)

    expected, _ = jax.jit(lambda: gradient(heads, own))()
    heads = dataclasses.replace(heads, selector=RANKS)
    rule, learned = optax.adam(0.03), random_selector(heads)

    def step(carry: Any, _: None) -> Any:
        learned, moments = carry
        grads, terms = gradient(heads, own | {"selector": learned})
        of_selector = grads["heads"].pop("selector")
        updates, moments = rule.update(of_selector, moments)
        return (optax.apply_updates(learned, updates), moments), (terms.heads, grads)

    run = jax.jit(lambda first: jax.lax.scan(step, (first, rule.init(first)), None, length=60))
    _, (terms, grads) = run(learned)
    for name, leaf in flat(expected["heads"]).items():
        np.testing.assert_allclose(flat(grads["heads"])[name][0], leaf, rtol=1e-5, err_msg=name)
    first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], terms) for i in (0, -1))
    for alone, before, after in zip(last.heads, first.selector, last.selector, strict=True):
        assert float(after.loss) < 0.7 * float(before.loss)
        assert float(after.hits[0]) > 1.3 * float(alone.hits[0])
    assert float(last.accepted[1, 0]) > float(last.accepted[0, 0])
