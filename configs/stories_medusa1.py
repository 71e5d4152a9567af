"""Medusa-1 on a 260K-parameter TinyStories model: five heads from scratch on a CPU in minutes.

    python train.py --config configs/stories_medusa1.py --workdir runs/stories_medusa1

Purpose: the whole way from text to heads at a size where it can be tried.
Recipe: the paper's loss (section 2.2.1); rate, batch and length were chosen for this model.
Hardware: 2 CPU cores and 2 GB. Data: the TinyStories texts that lie beside a maintainer's
checkout; any other with `--config.data.train="('stories.txt',)"`.
"""

from medusa_jax.training.settings import Backbone, Config, Data, Heads, Loss, Mesh, Optim, Run

SHARED = "../shared"
TEXTS = ("tinystories_val", "tinystories_a", "tinystories_b")


def get_config() -> Config:
    """The run."""
    return Config(
        mode="medusa1",
        model=Backbone(path=f"{SHARED}/models/stories260K", dtype="float32", remat=False),
        heads=Heads(number=5, layers=1),
        data=Data(
            train=tuple(f"{SHARED}/text/{name}.txt" for name in TEXTS),
            eval=(f"{SHARED}/text/tinystories_test.txt",),
            eval_rows=128,
            end="<s>",  # this model ends a story with the token that begins one
            sequence_length=256,
        ),
        loss=Loss(chunk=0),
        optim=Optim(
            learning_rate=1e-3,
            heads_multiplier=4.0,
            batch_size=16,
            epochs=3,
            warmup_steps=40,
            beta2=0.99,
        ),
        mesh=Mesh(fsdp=1),
        run=Run(log_every=20, eval_every=500, save_every=500),
    )
