"""Medusa-1 heads for the shipped model, on what it says itself.

    own() {
      python -m medusa_jax.distill --model runs/shipped_pretrain/model --autoregressive \\
          --data data/shipped/$2.jsonl --shard $3 --max_documents $4 --temperature $5 \\
          --batch_size 32 --output data/shipped/own_$1.jsonl
    }
    own greedy tales 1/3 12576 0
    own tales tales 2/3 12384 0.3
    own dialogues dialogues 0/1 300 0.3
    python train.py --config configs/shipped_medusa1.py --workdir runs/shipped_medusa1

Purpose: heads that know how this backbone goes on; on other people's text they learn less.
Recipe: the paper's loss (section 2.2.1) with self-distillation (2.3.2). Two blocks a head and the
lm_head for all: a projection of its own for each head would not fit the 32 MB it may have, nor
the time of a step.
Hardware: 2 CPU cores and 4 GB.
"""

import _recipes
from medusa_jax.training.settings import Config


def get_config() -> Config:
    """The run."""
    return _recipes.shipped("runs/shipped_pretrain/model", train=_recipes.OWN)
