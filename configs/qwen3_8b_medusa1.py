"""Medusa-1 on Qwen3-8B.

    python train.py --config configs/qwen3_8b_medusa1.py --workdir runs/qwen3_8b_medusa1

Purpose and recipe: those of `llama3_8b_medusa1`, for a vocabulary of 151,936 words.
Hardware: see docs/compile_matrix.md; fits v5e:4x4.
"""

import _recipes
from medusa_jax.training.settings import Config


def get_config() -> Config:
    """The run."""
    return _recipes.shared_medusa1("Qwen/Qwen3-8B", shape="qwen3-8b")
