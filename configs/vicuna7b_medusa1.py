"""Medusa-1 on Vicuna-7B-v1.5 (paper, section 2.2.1 and appendix B).

    python train.py --config configs/vicuna7b_medusa1.py --workdir runs/vicuna7b_medusa1

Purpose: Medusa-1, heads alone on the frozen backbone.
Recipe: the original's axolotl recipe, stage 1; see `_recipes.medusa1`.
Hardware: see docs/compile_matrix.md; fits v5e:4x4 and v5p:2x2x2.
"""

import _recipes
from medusa_jax.training.settings import Config


def get_config() -> Config:
    """The run."""
    return _recipes.medusa1("lmsys/vicuna-7b-v1.5", shape="llama2-7b", template="vicuna")
