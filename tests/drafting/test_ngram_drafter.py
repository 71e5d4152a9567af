"""Prompt lookup: where the last tokens occurred before, and what followed them there."""

import jax.numpy as jnp
import pytest

from medusa_jax.drafting.ngram_drafter import NgramDrafter, continued, longest_match
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError


def matched(text: list[int], longest: int = 4) -> int:
    """`longest_match` of a single text, whose row has more cells, with other tokens in them."""
    row = jnp.array([[*text, *text[-1:], 1, 2]])
    place, count = longest_match(row, jnp.array([len(text) - 1]), longest)
    end, count = int(place[0]), int(count[0])
    assert text[end + 1 - count : end + 1] == text[len(text) - count :] and count <= longest
    assert (count > 0) == (end >= 0)
    return end


@pytest.mark.slow
def test_the_latest_of_the_longest_matches_is_taken():
    text = [5, 6, 7, 8, 6, 7, 9, 7, 6, 7]  # the example of the docstring
    assert matched(text) == 5
    assert matched(text, longest=1) == 7
    assert matched([5, 6, 7, 1, 6, 7, 5, 6, 7]) == 2  # three tokens agree, later only two
    assert matched([4, 4, 4]) == 1
    assert matched([1, 2, 3]) == matched([9]) == -1


def test_guesses_are_what_followed_and_repeat_behind_the_end():
    text, last = jnp.array([[5, 6, 7, 5, 0, 0], [1, 2, 3, 4, 2, 0]]), jnp.array([3, 4])
    assert continued(text, jnp.array([0, -1]), last, 4).tolist() == [[6, 7, 5, 6], [2, 2, 2, 2]]
    assert continued(text, jnp.array([0, 1]), last, 2).tolist() == [[6, 7], [3, 4]]


def test_n_grams_guess_chains_only(tiny):
    NgramDrafter(Tree.chain(3)).check(tiny.config)
    with pytest.raises(InputError, match="chain:DEPTH"):
        NgramDrafter(Tree.from_lists([[0], [1]])).check(tiny.config)
