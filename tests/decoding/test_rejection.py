"""Drawn guesses that are kept or rejected: the text follows the target's distribution exactly.

Chi-square as in `test_lossless.py`. Over random seeds all cases together would raise a false alarm
once in 1 / FALSE_ALARM.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from decoding.test_lossless import FALSE_ALARM, SMALL, TARGETS, counts, exact, exact_logits, p_value
from helpers.models import TinyModel, random_model

from medusa_jax.decoding import rejection
from medusa_jax.drafting.draft_model import DraftModel
from medusa_jax.drafting.tree import Tree

# A node of rank 2 without siblings of rank 1 takes the second draw.
TREES = {"chain": Tree.chain(2), "bushy": Tree.from_lists([[0], [1], [2], [0, 0], [0, 2], [1, 0]])}
CASES = [("chain", "warm, top-p"), ("bushy", "plain"), ("bushy", "cold, top-k")]
LEVEL = FALSE_ALARM / len(CASES)


def test_the_example_of_judge():
    children, tokens = jnp.array([[False, True]]), jnp.array([[3, 0]])
    p, q = jnp.array([[0.5, 0.5]]), jnp.array([[0.75, 0.25]])
    for chance, slot, left in [(0.66, 1, [0.5, 0.5]), (0.67, 0, [0, 1])]:
        found = rejection.judge(children, tokens, p, q, jnp.array([[chance]]))
        assert found[0].tolist() == [slot] and found[1].tolist() == [left]


def test_a_second_sibling_is_judged_by_what_is_left():
    """After token 0 is rejected, (0, 2/3, 1/3) is left of p, and (0, 1/4, 3/4) of q."""
    children, tokens = jnp.array([[False, True, True]]), jnp.array([[9, 0, 2]])
    p, q = jnp.array([[0.2, 0.5, 0.3]]), jnp.array([[0.6, 0.1, 0.3 - 1e-9]])
    slot, left = rejection.judge(children, tokens, p, q, jnp.array([[0.9, 0.001]]))
    assert slot.tolist() == [0]
    np.testing.assert_allclose(left, [[0, 1, 0]], atol=1e-6)


def test_tokens_that_were_not_drawn_are_not_accepted():
    """Two children of a distribution over one token: the second is no draw."""
    children, tokens = jnp.array([[False, True, True]]), jnp.array([[9, 0, 1]])
    p, q = jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]])
    slot, left = rejection.judge(children, tokens, p, q, jnp.zeros((1, 2)))
    assert slot.tolist() == [0] and left.tolist() == [[0, 1]]


@pytest.fixture(scope="module")
def small() -> TinyModel:
    """The model of `test_lossless.py`, and another with its shape that drafts for it."""
    model, other = random_model(SMALL, seed=1), random_model(SMALL, seed=2)
    for one in (model, other):
        one.params["backbone"]["lm_head"] /= 3
    model.params["draft"] = other.params["backbone"]
    return model


@pytest.fixture(scope="module")
def targets(small: TinyModel) -> dict[str, np.ndarray]:
    """The exact distribution under each setting."""
    logits = exact_logits(small)
    return {name: exact(logits, target) for name, target in TARGETS.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("tree", "target"), CASES)
def test_text_follows_the_exact_distribution(small, targets, tree: str, target: str):
    drafter = DraftModel(SMALL, TREES[tree], TARGETS[target])
    observed, accepted = counts(small, drafter, TARGETS[target], seed=CASES.index((tree, target)))
    assert not observed[targets[target] == 0].any()
    assert p_value(observed, targets[target]) > LEVEL
    assert accepted > 1.3


@pytest.mark.slow
def test_a_rejection_that_draws_from_all_of_the_target_is_told_apart(small, targets, monkeypatch):
    judge = rejection.judge
    monkeypatch.setattr(rejection, "judge", lambda c, t, p, q, r: (judge(c, t, p, q, r)[0], p))
    drafter = DraftModel(SMALL, Tree.chain(1), TARGETS["plain"])  # compiled for no other test
    observed, _ = counts(small, drafter, TARGETS["plain"], seed=50)
    assert p_value(observed, targets["plain"]) < LEVEL
