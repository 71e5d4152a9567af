"""Decoding with Hydra heads: texts of plain decoding, and trees that the heads would grow."""

import dataclasses
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hydra import with_hydra
from helpers.models import TinyModel

from medusa_jax.checkpoints.weight_layout import for_decoding
from medusa_jax.decoding.acceptance import Acceptance, Greedy, Lossless
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.drafting.drafter import NoDraft, Verified
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.hydra_drafter import HydraDrafter, best_of
from medusa_jax.drafting.hydra_heads import HydraHead, head_input
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.serving.drafters import Recipe, drafter_of
from medusa_jax.tuning.head_ranks import replayed

PROMPTS = [[1, 5, 9], [3], [7, 2, 11, 30, 4]]
STATIC = Tree(((0,), (1,), (0, 0), (1, 0), (1, 1), (0, 2), (0, 0, 0), (1, 1, 0)))
GROWN = DynamicTree(9, 3, 5)
SMALL = dataclasses.replace(GROWN, size=4)
SHAPES = {
    "own": {},
    "two layers": {"num_layers": 2},
    "shared and truncated": {"shared": True, "truncated": 17, "vocab_size": 0},
}


def prepared(model: TinyModel) -> Any:
    """Parameters as decoding holds them; truncated heads with the rows that they share."""
    params = model.params
    if model.heads.truncated:
        rows = params["backbone"]["lm_head"][params["heads"]["token_map"]]
        params = params | {"heads": params["heads"] | {"vocab": rows}}
    return for_decoding(params, tied=model.config.tied)


def decoded(
    model: TinyModel, tree: Tree | DynamicTree, scheme: Acceptance = Greedy(), rows: Any = PROMPTS
) -> list[tuple[list[int], list[int]]]:
    """(text, tokens of each step) of each prompt."""
    decoder = Decoder(model.config, drafter_of_heads(model.heads, tree), scheme, capacity=64)
    params = prepared(model)
    state = decoder.prefill(params, rows, max_new_tokens=32)
    done = outputs(decoder.generate(params, state))
    return [(one.token_ids, one.tokens_per_step) for one in done]


def test_the_drafter_is_that_of_the_heads(tiny: TinyModel):
    heads = with_hydra(tiny).heads
    assert isinstance(drafter_of_heads(heads, STATIC), HydraDrafter)
    with pytest.raises(InputError, match="4 deep"):
        Decoder(tiny.config, drafter_of_heads(heads, Tree.chain(4)))
    recipe: Any = Recipe(types.SimpleNamespace(heads=heads), STATIC, Greedy())
    assert drafter_of(None, recipe) == drafter_of("hydra", recipe) == HydraDrafter(heads, STATIC)
    with pytest.raises(InputError, match="--drafter medusa: the heads of this model are hydra"):
        drafter_of("medusa", recipe)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Greedy(), Lossless(0.8)], ids=["greedy", "lossless"])
def test_text_is_that_of_plain_decoding(tiny: TinyModel, scheme: Acceptance):
    """Lossless draws depend on the place in the text alone. A batch takes each row's own steps."""
    model = with_hydra(tiny)
    plain = [text for text, _ in decoded(model, Tree(), scheme)]
    for tree in (STATIC, GROWN):
        found = decoded(model, tree, scheme)
        assert [text for text, _ in found] == plain
        assert max(max(steps) for _, steps in found) > 1
        if tree is GROWN and scheme == Greedy():
            assert decoded(model, tree, scheme, PROMPTS[2:]) == found[2:]


@pytest.mark.slow
def test_text_does_not_depend_on_the_tree_of_each_step(tiny: TinyModel):
    """As a server changes it: a state's draft is read by trees of all sizes, and plain steps."""
    model = with_hydra(tiny)
    whole, params = HydraDrafter(model.heads, GROWN), prepared(model)
    drafters = whole, whole.smaller(SMALL), NoDraft()
    decoders = [Decoder(model.config, each, Greedy(), capacity=64) for each in drafters]
    state = decoders[0].prefill(params, PROMPTS, max_new_tokens=32)
    for step in range(33):
        state, _ = decoders[step % 3].step(params, state)
    assert [one.token_ids for one in outputs(state)] == [text for text, _ in decoded(model, Tree())]


@pytest.mark.slow
def test_a_smaller_tree_is_that_which_the_heads_would_grow(tiny: TinyModel):
    model = with_hydra(tiny)
    found = drafted(model, HydraDrafter(model.heads, GROWN).smaller(SMALL))[0]
    expected = drafted(model, HydraDrafter(model.heads, SMALL))[0]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def drafted(model: TinyModel, drafter: HydraDrafter) -> tuple[Any, Any, Any]:
    """The proposal of two rows, and what the heads read."""
    params = prepared(model)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(0, 1, (2, model.config.hidden_size)), jnp.float32)
    root, none = jnp.array([5, 31]), jnp.zeros(2, jnp.int32)
    seen = Verified(hidden, root, jnp.zeros((2, 8), jnp.int32), none, none, most=1)

    @jax.jit
    def propose() -> Any:
        backbone = Backbone(model.config).bind({"params": params["backbone"]})
        draft = drafter.draft(params, backbone, drafter.begin(params, backbone, 2, 8), seen)
        return drafter.propose(params, draft, root)

    return propose(), hidden, root


def after(model: TinyModel, hidden: Any, path: list[int]) -> tuple[list[int], Any]:
    """Tokens that a head guesses after the root and some guesses, best first; log-probabilities."""
    heads, backbone = model.params["heads"], model.params["backbone"]
    z = head_input(hidden, backbone["embed"]["embedding"][jnp.array(path)])
    variables: Any = {"params": heads[f"head_{len(path) - 1}"]}
    ids = heads.get("token_map", jnp.arange(model.config.vocab_size))
    unembed = backbone["lm_head"][ids]
    scores: Any = HydraHead(model.heads).apply(variables, z, lambda x: unembed @ x)
    scores = jax.nn.log_softmax(scores)
    order = jnp.argsort(-scores)
    return ids[order].tolist(), scores[order]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_a_static_tree_holds_the_ranks_after_each_node(tiny: TinyModel, shape: str):
    model = with_hydra(tiny, **SHAPES[shape])
    proposal, hidden, root = drafted(model, HydraDrafter(model.heads, STATIC))
    for row in range(2):
        for slot, node in enumerate(STATIC.slots):
            path = [int(root[row])]
            for rank in node:
                path.append(after(model, hidden[row], path)[0][rank])
            assert int(proposal.tokens[row, slot]) == path[-1], node


@pytest.mark.slow
def test_a_grown_tree_holds_the_likeliest_paths(tiny: TinyModel):
    """Of all 5 + 25 paths of two heads, those that the heads think likeliest."""
    model = with_hydra(tiny)
    tree = dataclasses.replace(GROWN, depth=2)
    proposal, hidden, root = drafted(model, HydraDrafter(model.heads, tree))
    for row in range(2):
        scores: dict[tuple[int, ...], float] = {}
        first, chances = after(model, hidden[row], [int(root[row])])
        for a, chance in itertools.islice(zip(first, chances, strict=True), 5):
            scores[(a,)] = float(chance)
            second, more = after(model, hidden[row], [int(root[row]), a])
            for b, one in itertools.islice(zip(second, more, strict=True), 5):
                scores[(a, b)] = float(chance + one)
        best = sorted(scores, key=lambda path: -scores[path])[: tree.size - 1]
        found = []
        for slot in range(1, tree.size):
            line = proposal.tree.ancestors[row, slot].tolist()
            found.append(tuple(int(proposal.tokens[row, cell]) for cell in line[1:] if cell >= 0))
        assert set(found) == set(best)


@pytest.mark.slow
def test_ranks_of_the_tokens_that_came(tiny: TinyModel):
    """As the tuning replays them: each head after the right tokens before."""
    model = with_hydra(tiny, **SHAPES["shared and truncated"])
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 40, (1, 7)))
    ranks, _ = replayed(model.config, model.heads, (), prepared(model), ids)
    variables = {"params": model.params["backbone"]}
    positions = jnp.arange(7)[None]
    hidden: Any = Backbone(model.config).apply(variables, ids, positions, causal_mask(7))
    text = ids[0].tolist()
    for t in range(7):
        for k in range(1, min(3, 7 - t - 2) + 1):
            guesses, _ = after(model, hidden[0][0, t], text[t + 1 : t + k + 1])
            right = text[t + k + 1]
            expected = guesses.index(right) if right in guesses else model.config.vocab_size
            assert ranks[0, t, k - 1] == expected


def test_the_example_of_the_docstring():
    rows, scores = best_of(jnp.log(jnp.array([[[1.0, 3.0]]])), 2)
    assert rows.tolist() == [[[1, 0]]]
    np.testing.assert_allclose(jnp.exp(scores), [[[0.75, 0.25]]], rtol=1e-6)
