"""The shipped model's heads, at last, for the 1,024 tokens that it says most.

    python train.py --config configs/shipped_truncated.py --workdir runs/shipped_truncated

Purpose: a quarter of the lm_head to read for the heads, and 98% of what the model says is in it.
Recipe: one more epoch of `shipped_heads`, from its heads, at a third of the rate.
Hardware: 2 CPU cores and 4 GB.
"""

from medusa_jax.training.settings import Backbone, Config, Data, Heads, Loss, Mesh, Optim, Run

DATA = "data/shipped"


def get_config() -> Config:
    """The run."""
    return Config(
        mode="medusa1",
        model=Backbone(path="runs/shipped_medusa2/model", dtype="float32", remat=False),
        heads=Heads(number=4, layers=2, shared=True, truncated=1024, path="runs/shipped_heads"),
        data=Data(
            train=tuple(
                f"{DATA}/own_{kind}.jsonl"
                for kind in ("greedy0", "greedy1", "greedy2", "tales", "dialogues")
            ),
            eval=(f"{DATA}/valid_tales.jsonl", f"{DATA}/valid_dialogues.jsonl"),
            eval_rows=64,
            sequence_length=512,
        ),
        loss=Loss(chunk=0),
        optim=Optim(
            learning_rate=1e-4,
            heads_multiplier=4.0,
            batch_size=4,
            accumulation=4,
            epochs=1,
            warmup_steps=40,
            beta2=0.99,
        ),
        mesh=Mesh(fsdp=1),
        run=Run(log_every=20, eval_every=0, save_every=200),
    )
