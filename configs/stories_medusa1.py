"""Medusa-1 on a 260K-parameter TinyStories model: five heads from scratch on a CPU in minutes.

    python train.py --config configs/stories_medusa1.py --workdir runs/stories_medusa1

Purpose: the whole way from text to heads at a size where it can be tried.
Recipe: the paper's loss (section 2.2.1); rate, batch and length were chosen for this model.
Hardware: 2 CPU cores and 2 GB. Data: the TinyStories texts that lie beside a maintainer's
checkout; any other with `--config.data.train="('stories.txt',)"`.
"""

import _recipes
from medusa_jax.training.settings import Config


def get_config() -> Config:
    """The run."""
    config = _recipes.stories()
    config.optim.learning_rate, config.optim.epochs = 1e-3, 3
    return config
