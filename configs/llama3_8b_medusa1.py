"""Medusa-1 on Llama-3.1-8B-Instruct.

    python train.py --config configs/llama3_8b_medusa1.py --workdir runs/llama3_8b_medusa1

Purpose: Medusa-1, heads alone on the frozen backbone.
The vocabulary of 128,256 words makes heads of their own projections large, so these share the
lm_head (the original's version "2").
Recipe: ours, after the paper's Medusa-1: rate, batch and length as for Vicuna-7B.
Hardware: see docs/compile_matrix.md; fits v5e:4x4.
"""

from medusa_jax.training.settings import Backbone, Config, Data, Heads, Loss, Mesh, Optim, Run


def get_config() -> Config:
    """The run."""
    return Config(
        mode="medusa1",
        model=Backbone(path="meta-llama/Llama-3.1-8B-Instruct", shape="llama3-8b"),
        heads=Heads(number=5, layers=1, shared=True),
        data=Data(
            train=("Aeala/ShareGPT_Vicuna_unfiltered",),
            sequence_length=4096,
        ),
        loss=Loss(chunk=256),
        optim=Optim(
            learning_rate=5e-4,
            heads_multiplier=4.0,
            batch_size=64,
            accumulation=4,
            epochs=2,
            warmup_steps=40,
        ),
        mesh=Mesh(fsdp=-1),
        run=Run(save_every=100, eval_every=100),
    )
