"""Drafters by name: the registry behind `--drafter`.

A new drafter is a class of its own, and a line here or in a program of yours:

    DRAFTERS["mine"] = lambda recipe: MyDrafter(recipe.tree)
"""

import dataclasses
from collections.abc import Callable

from medusa_jax.checkpoints.load import Model
from medusa_jax.decoding.acceptance import Acceptance
from medusa_jax.drafting.drafter import Drafter, NoDraft
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.medusa_drafter import medusa_drafter
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError, listed

OF_HEADS = ("medusa",)  # those whose guesses come from the heads of the model


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a drafter is built from.

    Attributes:
      model: the backbone, its heads and its draft model.
      tree: what each step verifies, deeper than the root alone.
      acceptance: what its guesses are accepted by.
    """

    model: Model
    tree: Tree | DynamicTree
    acceptance: Acceptance


DRAFTERS: dict[str, Callable[[Recipe], Drafter]] = {
    "medusa": lambda recipe: medusa_drafter(recipe.model.heads, recipe.tree),
}


def from_heads(name: str | None) -> bool:
    """Whether the drafter of this name asks heads: None, the default, and "medusa" do."""
    return name is None or name in OF_HEADS


def drafter_of(name: str | None, recipe: Recipe) -> Drafter:
    """The drafter of this name; plain decoding where the tree is the root alone.

    Args:
      name: of the registry, and what may follow it after a colon; None for that of the heads.

    Raises:
      InputError: no drafter has this name, or it is not for such a model or tree.
    """
    if not recipe.tree.depth:
        return NoDraft()
    if name is None:
        return medusa_drafter(recipe.model.heads, recipe.tree)
    builder = DRAFTERS.get(name.partition(":")[0])
    if builder is None:
        raise InputError(f"--drafter {name}: there is no such drafter; known: {listed(DRAFTERS)}")
    return builder(recipe)
