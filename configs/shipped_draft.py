"""A draft model for the shipped model: 1.1 million parameters, from random weights.

    python recipes/shipped_model.py --text ../shared/text --chat ../shared/chat
    python train.py --config configs/shipped_draft.py --workdir runs/shipped_draft
    python decode.py --drafter draft:runs/shipped_draft/model --prompt "Once upon a time"

Purpose: a smaller model that guesses for the shipped model, to compare with its heads.
Recipe: as `shipped_pretrain`, on the same texts.
Hardware: 2 CPU cores and 4 GB.
"""

import _recipes
import shipped_pretrain
from medusa_jax.training.settings import Config


def get_config() -> Config:
    """The run."""
    config = shipped_pretrain.get_config()
    config.model.path = f"{_recipes.SHIPPED_DATA}/draft"
    return config
