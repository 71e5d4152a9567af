"""What heads may learn, against plain NumPy, and that a run learns it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import TINY, TinyModel, stacked

from medusa_jax.drafting.medusa_heads import MedusaHeads
from medusa_jax.training import scanned_backbone
from medusa_jax.training.head_losses import (
    accepted_lengths,
    lk_hybrid,
    overlap,
    pace_weights,
    soft_cross_entropy,
    total_variation,
)
from medusa_jax.training.heads_objective import HeadsLoss
from medusa_jax.training.objective import Objective, report
from medusa_jax.training.selector_loss import candidates


def softmax(x: np.ndarray) -> np.ndarray:
    power = np.exp(x - x.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Logits of a backbone and of a head [2, 5, 9]."""
    rng = np.random.default_rng(0)
    return rng.normal(0, 2, (2, 5, 9)), rng.normal(0, 2, (2, 5, 9))


@pytest.mark.slow
def test_worked_examples():
    p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    assert float(total_variation(p, q)) == pytest.approx(0.4)
    assert float(soft_cross_entropy(p, q)) == pytest.approx(1.204, abs=1e-3)
    losses = jnp.array([0.0, np.log(2)])
    weights = pace_weights(losses, jnp.ones(2, bool), 0.5)
    np.testing.assert_allclose(weights, [1.75, 0.75], rtol=1e-6)
    ranks = jnp.array([0, 2, 0])
    assert [int(accepted_lengths(ranks, k)) for k in (1, 3)] == [1, 3]
    rows, values, missing = candidates(jnp.array([5.0, 1.0, 4.0, 3.0]), jnp.array(1), 2)
    assert (rows.tolist(), values.tolist(), bool(missing)) == ([0, 1], [5, 1], True)
    rows, values, missing = candidates(jnp.array([5.0, 1.0, 4.0, 3.0]), jnp.array(2), 2)
    assert (rows.tolist(), values.tolist(), bool(missing)) == ([0, 2], [5, 4], False)


def test_total_variation_and_lk_hybrid_are_their_formulas(pair: tuple[np.ndarray, np.ndarray]):
    p, q = map(softmax, pair)
    alpha = np.minimum(p, q).sum(-1)
    ours = tuple(map(jnp.asarray, pair))
    np.testing.assert_allclose(overlap(*ours), alpha, rtol=1e-5)
    np.testing.assert_allclose(total_variation(*ours), 1 - alpha, rtol=1e-5)
    np.testing.assert_allclose(1 - alpha, np.abs(p - q).sum(-1) / 2, rtol=1e-12)
    share = np.exp(-3 * alpha)
    kl = (p * np.log(p / q)).sum(-1)
    expected = share * kl + (1 - share) * (1 - alpha)
    np.testing.assert_allclose(lk_hybrid(*ours, 3.0), expected, rtol=1e-4)


def test_the_share_of_kl_is_not_learnt_from(pair: tuple[np.ndarray, np.ndarray]):
    """With eta 0 the gradient is that of KL alone: q - p."""
    p, q = map(softmax, pair)
    teacher, logits = map(jnp.asarray, pair)
    found = jax.grad(lambda x: jnp.sum(lk_hybrid(teacher, x, 0.0)))(logits)
    np.testing.assert_allclose(found, q - p, atol=1e-5)
    large = jax.grad(lambda x: jnp.sum(lk_hybrid(teacher, x, 1e3)))(logits)
    varied = jax.grad(lambda x: jnp.sum(total_variation(teacher, x)))(logits)
    np.testing.assert_allclose(large, varied, atol=1e-5)


def test_pace_weights_are_their_sum_and_end_with_the_document():
    rng = np.random.default_rng(1)
    losses, smoothing = rng.exponential(1, (4, 6)), 0.3
    counted = np.ones((4, 6), bool)
    counted[2:, 0] = False
    found = pace_weights(jnp.asarray(losses), jnp.asarray(counted), smoothing)
    likely = (1 - smoothing) * np.exp(-losses) + smoothing
    for t in range(6):
        last = 2 if t == 0 else 4
        for j in range(4):
            sums = [np.prod(likely[: m + 1, t]) for m in range(j, last)]
            assert float(found[j, t]) == pytest.approx(sum(sums), rel=1e-5), (j, t)


def test_accepted_lengths_are_counted_head_by_head():
    ranks = np.random.default_rng(2).integers(0, 6, (3, 40))
    for k in (1, 3, 5):
        expected = []
        for position in ranks.T:
            length = 0
            while length < 3 and position[length] < k:
                length += 1
            expected.append(length)
        assert accepted_lengths(jnp.asarray(ranks), k).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["d_pace", "tv", "lk_hybrid"])
def test_a_head_learns_from_the_backbone_after_the_token_that_it_guesses(
    tiny: TinyModel, kind: str
):
    """Losses, their sums and the accepted lengths of a batch, position by position in NumPy."""
    length, heads = 11, tiny.heads.num_heads
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, TINY.vocab_size, (2, length)))
    batch = {
        "tokens": tokens,
        "segments": jnp.ones_like(tokens),
        "positions": jnp.broadcast_to(jnp.arange(length), tokens.shape),
        "learnt": jnp.broadcast_to(jnp.arange(length) > 3, tokens.shape),
    }
    params = stacked(tiny.params, 2)
    objective = Objective(
        TINY, tiny.heads, "medusa1", decay=1.0, heads_loss=HeadsLoss(kind), chunk=4
    )
    terms = jax.jit(objective.terms)({"heads": params["heads"]}, params, batch)
    hidden = scanned_backbone.hidden_states(TINY, params["backbone"], batch)
    logits = MedusaHeads(tiny.heads).apply({"params": tiny.params["heads"]}, hidden, lambda x: x)
    teacher = hidden @ tiny.params["backbone"]["lm_head"].T
    expected, ranks = [], []
    for b in range(2):
        for t in range(length - 2):
            here = [k for k in range(heads) if 3 < t + k + 2 < length]
            q = [np.log(softmax(np.asarray(logits[k][b, t], np.float64))) for k in here]
            target = [int(tokens[b, t + k + 2]) for k in here]
            loss = np.full(heads, np.inf)
            loss[here] = [-one[token] for one, token in zip(q, target, strict=True)]
            if kind == "d_pace":
                weights = pace_weights(jnp.asarray(loss), jnp.isfinite(loss), 0.5)
                expected += [float(weights[k]) * loss[k] for k in here]
            for k, one in zip(here, q, strict=True):
                p = softmax(np.asarray(teacher[b, t + k + 1], np.float64))
                alpha = np.minimum(p, np.exp(one)).sum()
                share = {"tv": 0.0, "lk_hybrid": np.exp(-3 * alpha)}.get(kind)
                if share is not None:
                    kl = (p * (np.log(p) - one)).sum()
                    expected.append(share * kl + (1 - share) * (1 - alpha))
            if len(here) == heads:
                pairs = zip(q, target, strict=True)
                ranks.append([(one > one[token]).sum() for one, token in pairs])
    assert float(jnp.sum(terms.heads.learnt)) == pytest.approx(sum(expected), rel=1e-4)
    every = jnp.asarray(ranks).T
    eal = [1 + float(jnp.mean(accepted_lengths(every, k))) for k in (1, 3, 5, 10)]
    assert report(terms, 0.2, objective)["eal"] == pytest.approx(eal)
