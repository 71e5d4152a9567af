"""Medusa in JAX: several tokens a step from one language model, without a draft model.

Modules, in the order in which tokens pass through them:

    shapes      letters of array dimensions      config     ModelConfig from config.json
    layers      norm, rotary, attention          cache      keys and values of accepted tokens
    backbone    tokens -> hidden states          heads      hidden state -> guesses
    tree        which guesses to verify          sampling   target distribution and draws
    acceptance  which path becomes text          state      what a step advances
    decode      prefill, step, generate, stream

and around them:

    tensor_files, hf     checkpoints -> parameters
    text, records        text <-> token ids, JSON Lines
    answer, figures      prompts -> answers, and what they cost
    console, cli         for a person at a terminal
"""

from medusa_jax.acceptance import Greedy, Lossless, Typical
from medusa_jax.config import ModelConfig
from medusa_jax.decode import Decoder, Output, State, outputs
from medusa_jax.errors import InputError
from medusa_jax.hf import Model, load_model
from medusa_jax.tree import Tree

__all__ = [
    "Decoder",
    "Greedy",
    "InputError",
    "Lossless",
    "Model",
    "ModelConfig",
    "Output",
    "State",
    "Tree",
    "Typical",
    "load_model",
    "outputs",
]
