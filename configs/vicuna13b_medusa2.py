"""Medusa-2 on Vicuna-13B-v1.5, second of two stages (paper, section 2.2.2 and appendix B).

    python train.py --config configs/vicuna13b_medusa2.py --workdir runs/vicuna13b_medusa2

Purpose and recipe: those of `vicuna7b_medusa2`, from the heads of `vicuna13b_medusa1`.
Hardware: see docs/compile_matrix.md; fits v5e:4x4 and v5p:2x2x2.
"""

import _recipes
from medusa_jax.training.settings import Config


def get_config() -> Config:
    """The run."""
    return _recipes.medusa2(
        "lmsys/vicuna-13b-v1.5", "llama2-13b", template="vicuna", heads="runs/vicuna13b_medusa1"
    )
