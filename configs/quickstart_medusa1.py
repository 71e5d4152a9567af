"""Medusa-1 heads for the shipped model, from its own answers to the shipped prompts.

    mkdir -p data && python -m medusa_jax.distill --data medusa_jax/shipped/prompts.jsonl \\
        --output data/quickstart.jsonl --batch_size 16 --max_new_tokens 64
    python train.py --config configs/quickstart_medusa1.py --workdir runs/quickstart
    python decode.py --heads runs/quickstart/heads --prompt "Once upon a time"

Purpose: the whole way from a model to heads for it, in a minute and with nothing to download.
Recipe: the paper's loss (section 2.2.1) with self-distillation (2.3.2). These few answers make
heads for this demonstration; `shipped_medusa1` made those that ship.
Hardware: 2 CPU cores and 2 GB.
"""

from pathlib import Path

import _recipes
import medusa_jax
from medusa_jax.training.settings import Config, Heads


def get_config() -> Config:
    """The run."""
    config = _recipes.on_a_cpu(str(Path(medusa_jax.__file__).parent / "shipped"))
    config.heads = Heads(number=4, layers=1, shared=True)
    config.data.train, config.data.sequence_length = ("data/quickstart.jsonl",), 256
    config.data.eval_fraction = 0.1
    config.optim.batch_size, config.optim.epochs = 4, 3
    config.optim.learning_rate, config.optim.warmup_steps = 2e-3, 4
    return config
