"""Medusa-2 on Vicuna-13B-v1.5, second of two stages (paper, section 2.2.2 and appendix B).

    python train.py --config configs/vicuna13b_medusa2.py --workdir runs/vicuna13b_medusa2

Purpose: Medusa-2, backbone and heads together, from the heads of `vicuna13b_medusa1`:
train that first, or start without (`--config.heads.path=`).
Recipe: stage 2 of the original's: LoRA 32/16, backbone 5e-4, heads 2e-3, lambda_0 = 0.2 constant,
starting from the heads of stage 1.
Hardware: see docs/compile_matrix.md; fits v5e:4x4 and v5p:2x2x2.
"""

from medusa_jax.training.settings import Backbone, Config, Data, Heads, Lora, Loss, Mesh, Optim, Run


def get_config() -> Config:
    """The run."""
    return Config(
        mode="medusa2",
        model=Backbone(path="lmsys/vicuna-13b-v1.5", shape="llama2-13b"),
        heads=Heads(number=5, layers=1, path="runs/vicuna13b_medusa1"),
        lora=Lora(rank=32, alpha=16.0, dropout=0.05),
        data=Data(
            train=("Aeala/ShareGPT_Vicuna_unfiltered",),
            template="vicuna",
            sequence_length=4096,
        ),
        loss=Loss(heads_weight=0.2, ramp="constant", chunk=512),
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
