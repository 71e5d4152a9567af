"""Self-distilled Medusa-2 on Zephyr-7B-beta (paper, sections 2.3.2 and 3.2).

    python -m medusa_jax.distill --model HuggingFaceH4/zephyr-7b-beta \\
        --data Aeala/ShareGPT_Vicuna_unfiltered --output data/zephyr7b.jsonl
    python train.py --config configs/zephyr7b_medusa2.py --workdir runs/zephyr7b_medusa2

Purpose: Medusa-2 in one stage on the model's own answers. The data it was tuned on is not public.
Recipe: the original's, in 8 pieces a step; see `_recipes.self_distilled`.
Hardware: see docs/compile_matrix.md; fits v5e:4x4.
"""

import _recipes
from medusa_jax.training.settings import Config


def get_config() -> Config:
    """The run."""
    model, shape = "HuggingFaceH4/zephyr-7b-beta", "mistral-7b"
    config = _recipes.self_distilled(model, shape, "zephyr", data="data/zephyr7b.jsonl")
    config.optim.accumulation = 8
    return config
