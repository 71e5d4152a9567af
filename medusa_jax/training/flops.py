"""FLOPs of a training step: those of its traced products, and those that the model asks for.

A position counts twice for each parameter that it meets, twice more for the gradient of what
comes before, and twice more for the parameter's own where it learns. Attention within documents
as long as a row counts half of all pairs.
"""

import math
from typing import Any

from jax.extend.core import jaxprs_in_params

from medusa_jax.drafting.medusa_heads import HYDRA, HeadsConfig
from medusa_jax.model.config import ModelConfig
from medusa_jax.training.settings import Config


def traced(jaxpr: Any, trips: int = 1) -> float:
    """FLOPs of the products of a jaxpr, those in loops times their number of passes.

    Of branches the least counts: a step that is not logged computes no loss of the lm_head.

    Args:
      trips: passes of a loop whose number the data decides.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        times = {"scan": equation.params.get("length", 1), "while": trips}
        inner = [traced(part, trips) for part in jaxprs_in_params(equation.params)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "cond":
            total += min(inner)
        else:
            total += times.get(equation.primitive.name, 1) * sum(inner)
    return total


def needed(config: Config, model: ModelConfig, heads: HeadsConfig) -> float:
    """FLOPs that a step of the model needs, when all positions are learnt and none repeated."""
    width, length = model.hidden_size, config.data.sequence_length
    query, key = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    layers = model.num_layers * width * (2 * query + 2 * key + 3 * model.ffn_size)
    pairs = model.num_layers * 2 * query * length / 2  # of both products, for a position
    lm_head, block = width * model.vocab_size, heads.num_layers * width * width
    vocab = width * (heads.truncated or model.vocab_size)
    learns = config.mode != "medusa1"
    full = learns and not config.adapted
    # Passes through each part: forward, and back to its inputs and its parameters.
    passes = 1 + learns + full
    backbone = passes * layers + (1 + 2 * learns) * pairs + (passes * lm_head if learns else 0)
    if config.data.hidden_states:
        backbone = 0.0
    if config.adapted:
        a_layer = (query + 3 * width + 2 * key + query) + 3 * (width + model.ffn_size)
        adapters = model.num_layers * a_layer + width + model.vocab_size
        backbone += 3 * config.lora.rank * adapters
    if config.loss.distill:
        backbone += layers + pairs + lm_head
    blocks = heads.num_heads * block
    if heads.architecture == HYDRA:  # in place of a first block, two products of 2, 3, ... states
        wider = sum(2 * (k + 2) - 1 for k in range(heads.num_heads))
        blocks += wider * width * width
    drafts = (2 + learns) * blocks + heads.num_heads * (2 + (full or not heads.shared)) * vocab
    return 2.0 * config.optim.batch_size * length * (backbone + drafts)
