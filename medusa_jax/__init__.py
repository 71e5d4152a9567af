"""Medusa in JAX: several tokens a step from one language model, without a draft model.

Modules, in the order in which tokens pass through them:

    shapes      letters of array dimensions      config     ModelConfig from config.json
    layers      norm, rotary, attention          cache      keys and values of accepted tokens
    backbone    tokens -> hidden states          heads      hidden state -> guesses
    tree        which guesses to verify          sampling   target distribution and draws
    acceptance  which path becomes text          state      what a step advances
    decode      prefill, step, generate, stream

and around them:

    tensor_files, places, hf    checkpoints -> parameters
    text, records               text <-> token ids, JSON Lines
    answer, figures             prompts -> answers, and what they cost
    console, cli, choices       for a person at a terminal
    distill, talks              a dataset's prompts -> the model's own answers
    training, export            heads, and backbones with them
    presets, tree_paths         known shapes; parameters by path
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
