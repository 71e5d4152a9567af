"""The shipped model's heads once more, on many different texts; the backbone stays.

    own() {
      python -m medusa_jax.distill --data data/shipped/tales.jsonl --shard $2 --temperature 0 \\
          --unique --tree grow:8 --batch_size 16 --output data/shipped/own_$1.jsonl "${@:3}"
    }
    base="--model runs/shipped_pretrain/model --heads runs/shipped_medusa1/heads"
    own greedy0 0/3 $base --max_documents 12576
    own greedy1 1/3 $base --max_documents 12576
    own greedy2 2/3 --model runs/shipped_medusa2/model
    train() { python train.py --config configs/shipped_heads.py --workdir runs/"$@"; }
    train shipped_heads
    train shipped_truncated --config.heads.path=runs/shipped_heads --config.heads.truncated=1024 \\
        --config.optim.epochs=1 --config.optim.learning_rate=1e-4

Purpose: of the greedy texts that the first two stages learn from, two in five are one of a few,
told again: many stories begin alike. Heads that know those by heart know others less well.
Recipe: as `shipped_medusa1`, from the heads of Medusa-2 and on its backbone; no greedy text more
than three times (once a shard). Then one epoch more for the 1,024 tokens that it says most: a
quarter of the lm_head to read for the heads, with 98% of what is said in it.
Hardware: 2 CPU cores and 4 GB.
"""

import _recipes
from medusa_jax.training.settings import Config


def get_config() -> Config:
    """The run."""
    kinds = ("greedy0", "greedy1", "greedy2", "tales", "dialogues")
    config = _recipes.shipped(
        "runs/shipped_medusa2/model", train=tuple(f"own_{kind}.jsonl" for kind in kinds)
    )
    config.heads.path = "runs/shipped_medusa2"
    config.optim.learning_rate, config.optim.epochs = 3e-4, 5
    return config
