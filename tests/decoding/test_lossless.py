"""Lossless sampling is lossless: counts against the exact distribution, and texts token for token.

A model small enough to enumerate: the probability of every continuation of
three tokens comes from the backbone alone, without cache, tree or decoder. Then
12,000 decoded continuations a case are counted, and chi-square compares.
Seeds are fixed, so a test passes always or never; over random seeds all cases
together would raise a false alarm once in 1 / FALSE_ALARM.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.models import TinyModel, random_model
from scipy import stats
from transformers import RepetitionPenaltyLogitsProcessor

from medusa_jax.decoding.acceptance import Accepted, Context, Lossless, Typical
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.sampling import row_keys, warp
from medusa_jax.decoding.state import Output, outputs
from medusa_jax.drafting.drafter import Drafter
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.model.config import ModelConfig

pytestmark = [pytest.mark.slow]

FALSE_ALARM = 1e-3
SAMPLES, BATCH = 12_000, 4_000
NEW = 3
PROMPT = [3, 1, 4, 1, 5]
SMALL = ModelConfig(
    vocab_size=8,
    hidden_size=16,
    ffn_size=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    context=16,
)
TREES = {
    "root alone": Tree(),
    "bushy": Tree(tuple((i,) for i in range(5)) + tuple(itertools.product(range(3), range(3)))),
    "deep": Tree.from_lists([[0], [0, 0], [1], [0, 0, 0], [1, 0], [1, 0, 1]]),
}
TARGETS = {
    "plain": Lossless(),
    "cold, top-k": Lossless(temperature=0.7, top_k=5),
    "warm, top-p": Lossless(temperature=1.3, top_p=0.8),
}
PENALTY = 1.4
CASES = list(itertools.product(TREES, TARGETS))
LEVEL = FALSE_ALARM / (len(CASES) + 1)  # and a case with a repetition penalty


@pytest.fixture(scope="module")
def small() -> TinyModel:
    """Some 150 of 512 continuations are likely (exp of the entropy); guesses are often right."""
    model = random_model(SMALL, seed=1)
    model.params["backbone"]["lm_head"] /= 3
    return model


def exact_logits(model: TinyModel) -> jax.Array:
    """The backbone's logits after the prompt, one and two more tokens [V * V, 3, V].

    Row (a, b) reads `PROMPT`, a, b in one pass.
    """
    pairs = np.array(list(itertools.product(range(model.config.vocab_size), repeat=2)))
    tokens = jnp.asarray(np.concatenate((np.tile(PROMPT, (len(pairs), 1)), pairs), axis=1))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    backbone, params = Backbone(model.config), {"params": model.params["backbone"]}
    hidden, _ = backbone.apply(params, tokens, positions, causal_mask(tokens.shape[1]))
    return backbone.apply(params, hidden[:, -NEW:], method="unembed")


def exact(logits: jax.Array, target: Lossless) -> np.ndarray:
    """Probability of each continuation by three tokens [V * V * V]."""
    vocab = logits.shape[-1]
    warped = warp(logits, target.temperature, target.top_k, target.top_p)
    p = np.asarray(jax.nn.softmax(warped), np.float64).reshape(vocab, vocab, NEW, vocab)
    first, second, third = p[0, 0, 0], p[:, 0, 1], p[:, :, 2]
    joint = first[:, None, None] * second[:, :, None] * third
    return joint.ravel() / joint.sum()


def penalized(logits: jax.Array) -> jax.Array:
    """`exact_logits` as transformers penalizes them: after `PROMPT`, a, b, from their tokens."""
    process, scores = RepetitionPenaltyLogitsProcessor(PENALTY), np.array(logits)
    for row, place in np.ndindex(len(scores), NEW):
        pair = divmod(row, scores.shape[-1])[:place]
        text = torch.tensor([[*PROMPT, *pair]])
        scores[row, place] = process(text, torch.from_numpy(scores[row, place])[None])[0]
    return jnp.asarray(scores)


def medusa(model: TinyModel, tree: str) -> Drafter:
    return drafter_of_heads(model.heads, TREES[tree])


def counts(
    model: TinyModel, drafter: Drafter, acceptance, seed: int, penalty: float = 1.0
) -> tuple[np.ndarray, float]:
    """How often each continuation was decoded [V * V * V], and the mean accepted length."""
    decoder = Decoder(model.config, drafter, acceptance)
    base = jax.random.key(seed)
    found, lengths = np.zeros(model.config.vocab_size**NEW, int), []
    for start in range(0, SAMPLES, BATCH):
        # As `row_keys(seed, [(0, sample), ...])`, all at once.
        samples = jnp.arange(start, start + BATCH)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(base, 0), samples)
        how = {"max_new_tokens": NEW, "keys": keys, "repetition_penalty": penalty}
        state = decoder.prefill(model.params, [PROMPT] * BATCH, **how)
        state = decoder.generate(model.params, state)
        place = len(PROMPT)
        texts = np.asarray(state.sequence)[:, place : place + NEW]
        cells = np.ravel_multi_index(tuple(texts.T), (model.config.vocab_size,) * NEW)
        found += np.bincount(cells, minlength=len(found))
        lengths.append(np.asarray(state.tokens_per_step)[:, 0].mean())
    return found, float(np.mean(lengths))


def p_value(observed: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square, cells that expect fewer than five merged into one; 0 for an impossible cell."""
    if observed[probabilities == 0].any():
        return 0.0
    expected = observed.sum() * probabilities
    rare = expected < 5
    if rare.any() and expected[rare].sum() < 5:  # the merged cell too: give it another one
        rare[np.where(rare, np.inf, expected).argmin()] = True
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue


@pytest.fixture(scope="module")
def targets(small: TinyModel) -> dict[str, np.ndarray]:
    """The exact distribution under each setting."""
    logits = jax.jit(lambda: exact_logits(small))()
    return {name: exact(logits, target) for name, target in TARGETS.items()}


def test_the_model_is_worth_testing(targets: dict[str, np.ndarray]):
    """Neither uniform nor certain, and the settings differ."""
    cells = SMALL.vocab_size**NEW
    for name, p in targets.items():
        likely = np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum())
        assert 20 < likely < 0.7 * cells, name
        assert (SAMPLES * p >= 5).sum() > 30, name
    assert (targets["plain"] > 0).all()
    assert (targets["cold, top-k"] > 0).sum() == 5**NEW
    assert 0 < (targets["warm, top-p"] > 0).sum() < cells


@pytest.mark.parametrize("tree, target", CASES)
def test_text_follows_the_exact_distribution(small, targets, tree: str, target: str):
    seed = CASES.index((tree, target))
    observed, accepted = counts(small, medusa(small, tree), TARGETS[target], seed)
    assert observed.sum() == SAMPLES
    assert not observed[targets[target] == 0].any()
    assert p_value(observed, targets[target]) > LEVEL
    assert accepted == 1 if tree == "root alone" else accepted > 1.1


def test_penalized_text_follows_the_exact_distribution(small, targets):
    """A tree whose nodes each see their own path; the free distribution is told apart."""
    target = TARGETS["cold, top-k"]
    right = exact(penalized(jax.jit(lambda: exact_logits(small))()), target)
    observed, accepted = counts(small, medusa(small, "bushy"), target, 200, PENALTY)
    assert p_value(observed, right) > LEVEL
    assert p_value(observed, targets["cold, top-k"]) < LEVEL
    assert accepted > 1.1


@dataclasses.dataclass(frozen=True)
class Redraw(Lossless):
    """Lossless but for one mistake: after a rejection it draws anew, with noise of its own."""

    def accept(self, tree, tokens, logits, context: Context) -> Accepted:
        accepted = super().accept(tree, tokens, logits, context)
        keys = jax.vmap(jax.random.fold_in, (0, None))(context.keys, 1)
        after = jnp.take_along_axis(logits, accepted.last[:, None, None], axis=1)[:, 0]
        again = self.root(after, Context(keys, context.position))
        return Accepted(accepted.last, again)


@pytest.mark.parametrize("scheme", [Typical(1.0, sample_root=True), Redraw()], ids=str)
def test_other_schemes_are_told_apart(small, targets, scheme):
    """The same test at the same level rejects them: it has the power to."""
    observed, _ = counts(small, medusa(small, "bushy"), scheme, seed=100)
    assert p_value(observed, targets["plain"]) < LEVEL


# --- token for token: a draw depends on its row's key and its position alone

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [20, 30], [39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29]]
KEYS = [(4, 0), (4, 1), (0, 7), (11, 2)]
TARGET = Lossless(temperature=1.1, top_k=25, top_p=0.97)
WIDE = Tree.published("mc_sim_7b_63").limit_depth(3)
DENSE = Tree(tuple(n for d in (1, 2, 3) for n in itertools.product(range(4), repeat=d)))


def decode(model: TinyModel, tree: Tree, rows: list[int]) -> list[Output]:
    decoder = Decoder(model.config, drafter_of_heads(model.heads, tree), TARGET)
    state = decoder.prefill(
        model.params,
        [PROMPTS[row] for row in rows],
        max_new_tokens=[70 + 5 * row for row in rows],
        stop_ids=[20],
        keys=row_keys(5, [KEYS[row] for row in rows]),
    )
    return outputs(decoder.generate(model.params, state))


@pytest.fixture(scope="module")
def plain(tiny: TinyModel) -> list[Output]:
    return decode(tiny, Tree(), [0, 1, 2, 3])


@pytest.mark.parametrize("tree", [WIDE, DENSE, TREES["bushy"]], ids=["published", "dense", "bushy"])
def test_any_tree_draws_the_text_of_plain_decoding(tiny, plain, tree: Tree):
    found = decode(tiny, tree, [0, 1, 2, 3])
    for output, expected in zip(found, plain, strict=True):
        assert output.token_ids == expected.token_ids
        assert output.finish_reason == expected.finish_reason
    assert all(output.mean_accepted_length == 1 for output in plain)
    assert np.mean([output.mean_accepted_length for output in found]) > 1.05
    assert max(max(output.tokens_per_step) for output in found) > 2


def test_rows_of_a_batch_equal_single_rows(tiny: TinyModel):
    whole = decode(tiny, WIDE, [0, 1, 2, 3])
    assert len({tuple(output.token_ids[:4]) for output in whole}) == 4
    for row, output in enumerate(whole):
        assert decode(tiny, WIDE, [row]) == [output]
    assert decode(tiny, WIDE, [2, 0, 3, 1]) == [whole[row] for row in (2, 0, 3, 1)]
