"""Medusa-2 on Vicuna-7B-v1.5, second of two stages (paper, section 2.2.2 and appendix B).

    python train.py --config configs/vicuna7b_medusa2.py --workdir runs/vicuna7b_medusa2

Purpose: Medusa-2, backbone and heads together, from the heads of `vicuna7b_medusa1`.
Train those first, or start without them (`--config.heads.path=`).
Recipe: the original's axolotl recipe, stage 2; see `_recipes.medusa2`.
Hardware: see docs/compile_matrix.md; fits v5e:4x4 and v5p:2x2x2.
"""

import _recipes
from medusa_jax.training.settings import Config


def get_config() -> Config:
    """The run."""
    return _recipes.medusa2(
        "lmsys/vicuna-7b-v1.5", "llama2-7b", template="vicuna", heads="runs/vicuna7b_medusa1"
    )
