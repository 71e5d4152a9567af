"""The one vocabulary of array dimensions, and the decorator that checks it.

Every public docstring, annotation and einsum string uses these letters:

    B  batch rows                      D  model (hidden) width
    T  tokens in one block             F  feed-forward width
    S  cache slots                     V  vocabulary
    N  tree nodes, root included       W  tokens that heads guess among, V or fewer
    E  path cells, tree depth + 1      H  query heads
    M  Medusa heads                    K  key/value heads
    R  ranks kept of each head         G  query heads per key/value head, H / K
    L  tokens of a bigram table        C  width of one attention head
    I  tree nodes that have children   P  those of them at one depth

Slot s of a cache row holds the token at position s of that row.
"""

from collections.abc import Callable
from typing import TypeVar, cast

from beartype import beartype
from jaxtyping import jaxtyped

_F = TypeVar("_F", bound=Callable)


def typed(function: _F) -> _F:
    """Checks a function's jaxtyping annotations: under `jax.jit`, at trace time only."""
    return cast(_F, jaxtyped(function, typechecker=beartype))
