"""Medusa-2 on the same 260K-parameter model: backbone and heads together, on a CPU in minutes.

    python train.py --config configs/stories_medusa1.py --workdir runs/stories_medusa1
    python train.py --config configs/stories_medusa2.py --workdir runs/stories_medusa2

Purpose: the second of the paper's two stages (section 2.2.2), from the heads of the first.
Recipe: the paper's loss; the whole backbone learns, since adapters of rank 32 would be no smaller
than its 64 x 64 matrices. Rates were chosen for this model. To hold the backbone closer, and to
have heads that know what it says, learn from its own stories, with KL to what it was:

    for t in 0.3 1; do
      python -m medusa_jax.distill --model ../shared/models/stories260K --autoregressive \\
          --data ../shared/text/tinystories_val.txt --words 3-16 --unique --batch_size 8 \\
          --temperature $t --output data/stories_$t.jsonl
    done
    python train.py --config configs/stories_medusa1.py --workdir runs/stories_self1 \\
        --config.data.train="('data/stories_0.3.jsonl',)" --config.optim.epochs=6
    python train.py --config configs/stories_medusa2.py --workdir runs/stories_self2 \\
        --config.data.train="('data/stories_0.3.jsonl', 'data/stories_1.jsonl')" \\
        --config.heads.path=runs/stories_self1 --config.loss.distill=true \\
        --config.loss.heads_weight=0.01 --config.optim.learning_rate=1e-4 \\
        --config.optim.heads_multiplier=20 --config.optim.epochs=3

Hardware: 2 CPU cores and 2 GB.
"""

import _recipes
from medusa_jax.training.settings import Config, Lora


def get_config() -> Config:
    """The run."""
    config = _recipes.stories()
    config.mode, config.lora, config.model.remat = "medusa2", Lora(rank=0), True
    config.heads.path = "runs/stories_medusa1"
    config.loss.heads_weight = 0.2
    config.optim.accumulation = 4  # what a piece needs stays in the CPU's cache
    config.optim.epochs = 1.5
    return config
