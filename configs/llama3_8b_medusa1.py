"""Medusa-1 on Llama-3.1-8B-Instruct.

    python train.py --config configs/llama3_8b_medusa1.py --workdir runs/llama3_8b_medusa1

Purpose: Medusa-1, heads alone on the frozen backbone.
A vocabulary of 128,256 words makes separate projections large, so the heads share the lm_head.
Recipe: ours, after the paper's Medusa-1; see `_recipes.shared_medusa1`.
Hardware: see docs/compile_matrix.md; fits v5e:4x4.
"""

import _recipes
from medusa_jax.training.settings import Config


def get_config() -> Config:
    """The run."""
    return _recipes.shared_medusa1("meta-llama/Llama-3.1-8B-Instruct", shape="llama3-8b")
