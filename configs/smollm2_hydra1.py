"""Hydra heads for SmolLM2-135M-Instruct, on what it says itself.

    python -m medusa_jax.distill --model smollm2 --data PROMPTS.jsonl --temperature 0.3 \\
        --max_new_tokens 320 --output data/smollm2.jsonl
    python train.py --config configs/smollm2_hydra1.py --workdir runs/smollm2_hydra1

Purpose: heads that see the tokens drafted before (arXiv 2402.05109), to compare with those of
`smollm2_medusa1` on the same answers and hidden states.
Recipe: as `smollm2_medusa1`, whose selector they do not need. Head k reads k + 1 vectors. All of it
has 18.6 MB.
Hardware: 2 CPU cores and 4 GB.
"""

import smollm2_medusa1
from medusa_jax.training.settings import Config


def get_config() -> Config:
    """The run."""
    config = smollm2_medusa1.get_config()
    config.heads.architecture, config.heads.layers, config.heads.selector = "hydra", 1, 0
    return config
