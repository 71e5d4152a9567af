"""Medusa in JAX: several tokens a step from one language model, without a draft model.

Modules, in the order in which tokens pass through them:

    shapes      letters of array dimensions      config     ModelConfig from config.json
    layers      norm, rotary, attention          layout     weights [in, out] for decoding
    cache       keys and values of accepted tokens
    backbone    tokens -> hidden states          heads      hidden state -> guesses
    tree        which guesses to verify          grow       ... chosen anew at every step
    bigrams     which tokens follow which, for trees grown
    sampling    target distribution and draws    acceptance which path becomes text
    state       what a step advances             decode     prefill, step, generate, stream

and around them:

    tensor_files, places, hf    checkpoints -> parameters
    sharding                    ... on several devices, and processes
    dialects, convert           heads of every layout, and from one to another
    directories                 written whole or not at all
    compile_only, topology      memory on machines that are not here
    text, records               text <-> token ids, JSON Lines
    answer, figures             prompts -> answers, and what they cost
    console, cli, choices       for a person at a terminal
    tune, calibration           the fastest tree for these heads and this device
    tune_report, tuned          ... as a table and a plot, and where it is kept
    bench                       speed and acceptance beside plain decoding and others
    distill, talks              a dataset's prompts -> the model's own answers
    count_bigrams               ... -> bigrams
    training, export            heads, and backbones with them
    presets, tree_paths         known shapes; parameters by path
    shipped                     the model that comes along
"""

from medusa_jax.checkpoints.load import Model, load_model
from medusa_jax.decoding.acceptance import Greedy, Lossless, Typical
from medusa_jax.decoding.decoder import Decoder, Output, State, outputs
from medusa_jax.drafting.dynamic_tree import Grown
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig

__version__ = "0.1.0"

__all__ = [
    "Decoder",
    "Greedy",
    "Grown",
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
