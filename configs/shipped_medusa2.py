"""Medusa-2 of the shipped model: backbone and heads together, held to what the backbone was.

    python train.py --config configs/shipped_medusa2.py --workdir runs/shipped_medusa2

Purpose: the second of the paper's two stages (section 2.2.2), from the heads of the first.
Recipe: KL to the backbone as it was (section 2.3.2) on its own texts and, so that it keeps what it
knew, on some of those it learnt from; the heads learn 20 times as fast.
Hardware: 2 CPU cores and 4 GB.
"""

import _recipes
from medusa_jax.training.settings import Config, Lora, Loss


def get_config() -> Config:
    """The run."""
    texts = (*_recipes.OWN, "stories.txt")  # its own, and stories that it learned from
    config = _recipes.shipped("runs/shipped_pretrain/model", train=texts)
    config.mode, config.lora = "medusa2", Lora(rank=0)
    config.heads.path = "runs/shipped_medusa1"
    config.data.end, config.data.max_documents = "</s>", 2500
    config.loss = Loss(heads_weight=0.03, distill=True, chunk=0)
    config.optim.learning_rate, config.optim.heads_multiplier = 1e-4, 20.0
    config.run.export_dtype = "bfloat16"
    return config
