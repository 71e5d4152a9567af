"""Medusa in JAX: several tokens a step from one language model, without a draft model.

Files at the top are what you import or run; folders are how it works, in the order in which
tokens pass through them:

    data            text, prompts and datasets -> token ids
    model           tokens -> hidden states and logits
    drafting        hidden state -> guesses, and the tree that verifies them
    decoding        prefill, step and acceptance on a static-shape state
    serving         prompts -> answers: slots that a queue refills, conversations
    distributed     meshes, sharding rules, compilers of machines that are not here
    checkpoints     files of each dialect <-> parameters
    training        heads, alone or with their backbone
    tuning, bench   the fastest tree; speed and acceptance beside others
    cli             what the command lines share
    shipped         a small model of our own

`shapes.py` lists the letters of array dimensions, docs/architecture.md who may import whom.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medusa_jax.checkpoints.load import Model, load_model
    from medusa_jax.decoding.acceptance import Greedy, Lossless, Typical
    from medusa_jax.decoding.decoder import Decoder
    from medusa_jax.decoding.state import Output, State, outputs
    from medusa_jax.drafting.draft_model import DraftModel
    from medusa_jax.drafting.drafter import NoDraft
    from medusa_jax.drafting.dynamic_tree import DynamicTree
    from medusa_jax.drafting.hydra_drafter import HydraDrafter
    from medusa_jax.drafting.medusa_drafter import MedusaDrafter
    from medusa_jax.drafting.ngram_drafter import NgramDrafter
    from medusa_jax.drafting.tree import Tree
    from medusa_jax.errors import InputError
    from medusa_jax.model.config import ModelConfig
    from medusa_jax.serving.async_generator import AsyncGenerator
    from medusa_jax.serving.generator import Generator

__version__ = "0.2.0"

__all__ = [
    "AsyncGenerator",
    "Decoder",
    "DraftModel",
    "DynamicTree",
    "Generator",
    "Greedy",
    "HydraDrafter",
    "InputError",
    "Lossless",
    "MedusaDrafter",
    "Model",
    "ModelConfig",
    "NgramDrafter",
    "NoDraft",
    "Output",
    "State",
    "Tree",
    "Typical",
    "load_model",
    "outputs",
]

# Modules are imported when a name of theirs is asked for: they take seconds, and a command
# listens for Ctrl-C before.
_PLACES = {
    "Model": "checkpoints.load",
    "load_model": "checkpoints.load",
    "Greedy": "decoding.acceptance",
    "Lossless": "decoding.acceptance",
    "Typical": "decoding.acceptance",
    "Decoder": "decoding.decoder",
    "Output": "decoding.state",
    "State": "decoding.state",
    "outputs": "decoding.state",
    "DraftModel": "drafting.draft_model",
    "NoDraft": "drafting.drafter",
    "DynamicTree": "drafting.dynamic_tree",
    "HydraDrafter": "drafting.hydra_drafter",
    "MedusaDrafter": "drafting.medusa_drafter",
    "NgramDrafter": "drafting.ngram_drafter",
    "Tree": "drafting.tree",
    "InputError": "errors",
    "ModelConfig": "model.config",
    "AsyncGenerator": "serving.async_generator",
    "Generator": "serving.generator",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
