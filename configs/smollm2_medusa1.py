"""Medusa-1 heads for SmolLM2-135M-Instruct, on what it says itself.

    python -m medusa_jax.distill --model smollm2 --data PROMPTS.jsonl --temperature 0.3 \\
        --max_new_tokens 320 --output data/smollm2.jsonl
    python train.py --config configs/smollm2_medusa1.py --workdir runs/smollm2_medusa1

Purpose: heads of a real chat model, small enough to be a file of its package.
Recipe: the paper's loss (section 2.2.1) with self-distillation (2.3.2). Heads guess among the
8,192 tokens that the answers hold most often, through these rows of the embedding: a sixth of
the projection to read in each step. The selector learns beside them. All of it has 6.3 MB.
Hardware: 2 CPU cores and 4 GB. A row of 1,024 tokens takes 2.8 CPU-seconds once, for the hidden
states of the backbone, and 1.2 in each epoch. On an H100 an epoch of 1,290 rows takes 14 s.
"""

import _recipes
from medusa_jax.training.settings import Config, Data, Heads, Run


def get_config() -> Config:
    """The run."""
    config = _recipes.on_a_cpu("smollm2")
    config.heads = Heads(number=4, layers=2, shared=True, truncated=8192, selector=128)
    config.data = Data(
        train=("data/smollm2.jsonl",),
        eval_fraction=0.02,
        eval_rows=16,
        sequence_length=1024,
        hidden_states="runs/smollm2_states",
    )
    config.loss.chunk = 128
    config.optim.batch_size = config.optim.accumulation = 4
    config.optim.learning_rate, config.optim.epochs = 5e-4, 3
    config.run = Run(log_every=50, eval_every=200, save_every=100, export_dtype="bfloat16")
    return config
