"""Counts which tokens follow which in a model's texts: the table of `drafting/bigrams.py`."""

from collections.abc import Iterable

import numpy as np

from medusa_jax.errors import InputError

# The heads know part of it already. On the shipped model 0.3 to 0.5 accept within 1% of each other.
_WEIGHT = 0.4
_PRIOR = 5.0  # how many observations the second token's own frequency weighs


def count(
    texts: Iterable[tuple[np.ndarray, np.ndarray]], most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `most` frequent tokens [L] and the scores of their pairs [L, L].

    Args:
      texts: of each, token ids [T] and whether they count as second of a pair [T] bool.

    Example: in the texts (1 2 1 2) and (2 3), tokens 2, 1, 3 come second 2, 1 and 1 times.
    After 2, which is followed twice, by 1 and by 3, these gain
    0.4 log((1 + 5/4) / (2 + 5) / (1/4)) = 0.1, and 2 loses 0.4 log((0 + 5/2) / (2 + 5) / (1/2)).

    Raises:
      InputError: there is not one pair.
    """
    pairs = [
        np.stack((ids[:-1], ids[1:]))[:, counted[1:]] for ids, counted in texts if len(ids) > 1
    ]
    before, after = np.concatenate([np.zeros((2, 0), np.int64), *pairs], axis=1)
    if not len(after):
        raise InputError("these texts hold no two tokens in a row to count")
    ids = max(before.max(), after.max()) + 1
    times = np.bincount(after, minlength=ids)
    tokens = np.argsort(-times, kind="stable")[:most]
    tokens = tokens[times[tokens] > 0]
    rows = np.full(ids, -1)
    rows[tokens] = np.arange(len(tokens))
    listed = (rows[before] >= 0) & (rows[after] >= 0)
    seen = np.zeros((len(tokens), len(tokens)))
    np.add.at(seen, (rows[before[listed]], rows[after[listed]]), 1)
    followed = np.bincount(before, minlength=ids)[tokens]
    alone = times[tokens] / len(after)
    after_it = (seen + _PRIOR * alone) / (followed[:, None] + _PRIOR)
    return tokens, _WEIGHT * np.log(after_it / alone)
