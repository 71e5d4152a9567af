"""The backbone of the shipped model, from random weights.

    python recipes/shipped_model.py --text ../shared/text --chat ../shared/chat
    python train.py --config configs/shipped_pretrain.py --workdir runs/shipped_pretrain

Purpose: a model small enough to ship, that tells stories and books tables.
Recipe: every story once as it is and twice as an answer, every dialogue once, in one pass.
Muon for the matrices: about 1,000 steps is all there is time for.
Hardware: 2 CPU cores and 4 GB. Data: TinyStories and schema-guided dialogues.
"""

import _recipes
from medusa_jax.training.settings import Config, Heads, Optim, Run


def get_config() -> Config:
    """The run."""
    texts = ("stories.txt", "tales.jsonl", "dialogues.jsonl")
    config = _recipes.shipped(f"{_recipes.SHIPPED_DATA}/base", train=texts)
    config.mode, config.model.random, config.heads = "pretrain", True, Heads()
    config.data.end, config.data.eval_rows = "</s>", 256
    config.optim = Optim(
        kind="muon",
        learning_rate=3e-3,
        batch_size=8,
        accumulation=8,  # what a piece needs stays in the CPU's cache
        epochs=1,
        warmup_steps=50,
        beta2=0.95,
        weight_decay=0.1,
    )
    config.run = Run(log_every=10, eval_every=200, save_every=200)
    return config
