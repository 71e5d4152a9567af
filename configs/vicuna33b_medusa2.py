"""Self-distilled Medusa-2 on Vicuna-33B-v1.3 (paper, sections 2.3.2 and 3.2).

    python -m medusa_jax.distill --model lmsys/vicuna-33b-v1.3 \\
        --data Aeala/ShareGPT_Vicuna_unfiltered --output data/vicuna33b.jsonl
    python train.py --config configs/vicuna33b_medusa2.py --workdir runs/vicuna33b_medusa2

Purpose: Medusa-2 in one stage on the model's own answers. The data it was tuned on is not public.
Recipe: the original's; see `_recipes.self_distilled`.
Hardware: see docs/compile_matrix.md; fits v5p:2x4x4.
"""

import _recipes
from medusa_jax.training.settings import Config


def get_config() -> Config:
    """The run."""
    return _recipes.self_distilled(
        "lmsys/vicuna-33b-v1.3", "llama1-33b", template="vicuna", data="data/vicuna33b.jsonl"
    )
