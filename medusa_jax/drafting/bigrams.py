"""Which tokens follow which: corrects guesses that the heads make without knowing each other.

Head k guesses the token at t+k+1 from the hidden state alone. With "New York" and
"Los Angeles" equally likely, both heads are right half of the time, and half of
the paths made of their guesses are nonsense. How often one token follows another
in the model's own texts tells these apart: guess b gets, after a,

    0.4 (log p(b | a) - log p(b))

on top of its head's log-probability (n-gram rescoring: Kim et al., arXiv
2404.09221). The token before head 1's guesses is the root, which is known by then.

Only dynamic trees read it (`dynamic_tree.py`). Verification does not change, so no
text changes. `checkpoints/bigram_file.py` has the file, `tuning/bigram_counts.py` the counts.
"""

from jaxtyping import Array, Float, Int

from medusa_jax.shapes import typed

NAME = "bigrams"  # of the file, and of its part of the parameters

Bigrams = dict[str, Array]  # {"rows": [V] int32, "scores": [L + 1, L + 1]}


@typed
def links(
    bigrams: Bigrams, before: Int[Array, "*dims R"], after: Int[Array, "*dims R"]
) -> Float[Array, "*dims R R"]:
    """What each guess gains after each of the tokens before it.

    Example: with scores (0.1 for 1 after 2) and nothing else, before (2 3) and
    after (3 1) -> ((0 0.1) (0 0)).
    """
    rows, scores = bigrams["rows"], bigrams["scores"]
    return scores[rows[before][..., :, None], rows[after][..., None, :]]
