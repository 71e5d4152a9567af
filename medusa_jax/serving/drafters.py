"""Drafters by name: the registry behind `--drafter`.

A new drafter is a class of its own, and a line here or in a program of yours:

    DRAFTERS["mine"] = lambda recipe: MyDrafter(recipe.tree)
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medusa_jax.checkpoints.load import Model
from medusa_jax.data.pretrained import load_tokenizer
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.decoding.acceptance import Acceptance, Lossless
from medusa_jax.drafting.draft_model import NAME as DRAFT
from medusa_jax.drafting.draft_model import DraftModel
from medusa_jax.drafting.drafter import Drafter, NoDraft
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.hydra_drafter import HydraDrafter
from medusa_jax.drafting.medusa_drafter import MedusaDrafter
from medusa_jax.drafting.medusa_heads import ARCHITECTURES, HYDRA, MEDUSA
from medusa_jax.drafting.medusa_ngram_drafter import MedusaNgramDrafter
from medusa_jax.drafting.ngram_drafter import NgramDrafter
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError, listed

OF_HEADS = (*ARCHITECTURES, "medusa+ngram")  # those whose guesses come from the heads of the model


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


def _of_heads(name: str, drafter: Callable[[Any, Any], Drafter]) -> Callable[[Recipe], Drafter]:
    """The drafter of heads of this architecture."""

    def build(recipe: Recipe) -> Drafter:
        heads = recipe.model.heads
        if heads.architecture != name:
            raise InputError(f"--drafter {name}: the heads of this model are {heads.architecture}")
        return drafter(heads, recipe.tree)

    return build


DRAFTERS: dict[str, Callable[[Recipe], Drafter]] = {
    MEDUSA: _of_heads(MEDUSA, MedusaDrafter),
    HYDRA: _of_heads(HYDRA, HydraDrafter),
    "medusa+ngram": lambda recipe: _medusa_ngram(recipe),
    "ngram": lambda recipe: NgramDrafter(_static(recipe)),
    "draft": lambda recipe: _draft_model(recipe),
}


def from_heads(name: str | None) -> bool:
    """Whether the drafter of this name asks heads, as that of None, the default, does."""
    return name is None or name.partition(":")[0] in OF_HEADS


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
        return drafter_of_heads(recipe.model.heads, recipe.tree)
    known = DRAFTERS.get(name.partition(":")[0])
    if known is None:
        raise InputError(f"--drafter {name}: there is no such drafter; known: {listed(DRAFTERS)}")
    return known(recipe)


def draft_directory(name: str | None) -> str | None:
    """The model that a drafter's name asks for: "draft:DIR" -> "DIR", None for other drafters.

    Raises:
      InputError: no model is named.
    """
    if name is None or name.partition(":")[0] != DRAFT:
        return None
    directory = name.partition(":")[2]
    if not directory:
        raise InputError("--drafter draft names no model; give draft:DIR, for example")
    return directory


def heads_directory(name: str | None) -> str | None:
    """The heads that a drafter's name asks for: "hydra:DIR" -> "DIR", None for other names."""
    architecture, _, directory = (name or "").partition(":")
    return directory or None if architecture in OF_HEADS else None


def with_draft(model: Model, draft: Model) -> Model:
    """The model with a smaller model that guesses for it."""
    parameters = model.parameters.having(**{DRAFT: draft.parameters.part("backbone")})
    return dataclasses.replace(model, parameters=parameters, draft=draft.config)


def check_vocabulary(text: ChatTokenizer, directory: Path) -> None:
    """Checks that a draft model means the same by a token id; without a tokenizer it is trusted.

    Raises:
      InputError: more than a tenth of the tokens have other ids in its tokenizer.
    """
    try:
        own, other = text.tokenizer.get_vocab(), load_tokenizer(directory).get_vocab()
    except InputError:
        return
    differ = [token for token, number in own.items() if other.get(token) != number]
    if len(differ) > len(own) // 10:
        raise InputError(
            f"--drafter draft:{directory}: its tokenizer has other ids for {len(differ):,} of "
            f"{len(own):,} tokens ({listed(differ, 3)}); give a draft model of the same vocabulary"
        )


def _medusa_ngram(recipe: Recipe) -> Drafter:
    if not isinstance(recipe.tree, DynamicTree):
        raise InputError("--drafter medusa+ngram grows its trees: give --tree grow:SIZE")
    return _of_heads(MEDUSA, MedusaNgramDrafter)(recipe)


def _draft_model(recipe: Recipe) -> Drafter:
    if recipe.model.draft is None:
        raise InputError("--drafter draft: the model was loaded without a draft model")
    # Rows with settings of their own are followed along the likeliest children.
    target = recipe.acceptance if isinstance(recipe.acceptance, Lossless) else None
    return DraftModel(recipe.model.draft, _static(recipe), target)


def _static(recipe: Recipe) -> Tree:
    if not isinstance(recipe.tree, Tree):
        raise InputError("--tree grow:SIZE is for heads; give chain:DEPTH or a file of a tree")
    return recipe.tree
