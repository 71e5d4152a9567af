"""Which losses end a run, and which pass."""

import math

import pytest

from medusa_jax.training.divergence import Diverged, Divergence


def run(losses: list[float], *, first: float, patience: int = 5, vocab: int = 512) -> int:
    """Steps that pass; the last of the losses is not the run's last."""
    divergence = Divergence.of(patience, vocab)
    divergence.began(first)
    for step, loss in enumerate(losses, start=1):
        try:
            divergence.check(step, loss, 1.0, last=False)
        except Diverged as error:
            assert str(error).startswith(f"step {step}: loss ")
            return step - 1
    return len(losses)


@pytest.mark.parametrize(
    ("first", "losses"),
    [
        (17.0, [17.5, 19.0, 16.0, 14.0, 9.0] * 4),  # heads that begin as copies of the lm_head
        (math.log(512), [6.3, 18.0, 6.0] * 5),  # random weights, with spikes
        (0.0, [0.0, 0.4, 1.9, 3.0, 5.0] * 4),  # distilling: the first KL is nothing at all
        (2.0, [60.0] * 4 + [2.0] + [60.0] * 4),  # a spike that is shorter than the patience
    ],
)
def test_what_passes(first: float, losses: list[float]):
    assert run(losses, first=first) == len(losses)


@pytest.mark.parametrize(
    ("first", "losses", "passed"),
    [
        (17.0, [17.0] + [6e13] * 9, 5),
        (2.0, [2.0] * 7 + [19.0] * 9, 11),  # 3 times the 6.2 of a uniform guess
        (17.0, [16.0, float("nan")], 1),
        (17.0, [float("inf")], 0),
    ],
)
def test_what_ends_a_run(first: float, losses: list[float], passed: int):
    assert run(losses, first=first) == passed


def test_patience_can_be_endless_but_not_for_what_is_no_number():
    assert run([1e9] * 100, first=17.0, patience=0) == 100
    assert run([1e9] * 3 + [float("nan")], first=17.0, patience=0) == 3
    with pytest.raises(Diverged, match=r"step 4: loss 2.0, gradient norm inf"):
        Divergence.of(5, 512).check(4, 2.0, float("inf"), last=False)


def test_a_run_does_not_end_far_above_its_beginning():
    divergence = Divergence.of(50, 512)
    divergence.began(2.0)
    divergence.check(8, 100.0, 1.0, last=False)
    with pytest.raises(Diverged, match=r"step 9: loss 100, above 18.71 for 2 steps"):
        divergence.check(9, 100.0, 1.0, last=True)
