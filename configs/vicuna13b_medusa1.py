"""Medusa-1 on Vicuna-13B-v1.5 (paper, section 2.2.1 and appendix B).

    python train.py --config configs/vicuna13b_medusa1.py --workdir runs/vicuna13b_medusa1

Purpose: Medusa-1, heads alone on the frozen backbone.
Recipe: the original's axolotl recipe, stage 1 (examples/medusa): 5 heads at 4 x 5e-4, 64 rows of
4096 tokens, 2 epochs of ShareGPT; here the backbone stays in bfloat16 instead of 4 bits.
Hardware: see docs/compile_matrix.md; fits v5e:4x4.
"""

from medusa_jax.training.settings import Backbone, Config, Data, Heads, Loss, Mesh, Optim, Run


def get_config() -> Config:
    """The run."""
    return Config(
        mode="medusa1",
        model=Backbone(path="lmsys/vicuna-13b-v1.5", shape="llama2-13b"),
        heads=Heads(number=5, layers=1),
        data=Data(
            train=("Aeala/ShareGPT_Vicuna_unfiltered",),
            template="vicuna",
            sequence_length=4096,
        ),
        loss=Loss(chunk=512),
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
