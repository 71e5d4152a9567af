"""Self-distilled Medusa-2 on Vicuna-33B-v1.3 (paper, sections 2.3.2 and 3.2).

    python train.py --config configs/vicuna33b_medusa2.py --workdir runs/vicuna33b_medusa2

Purpose: Medusa-2 in one stage on the model's own answers, since the data it was tuned on is not
public. Make them first:

    python -m medusa_jax.distill --model lmsys/vicuna-33b-v1.3 \\
        --data Aeala/ShareGPT_Vicuna_unfiltered --output data/vicuna33b.jsonl

Recipe: the original's (examples/medusa): LoRA 32/16 on an unquantised backbone, backbone 1e-4,
heads 4e-4, lambda_0 rising to 0.01 over the whole run by a sine, 128 rows of 2048 tokens, KL to
the backbone as it was.
Hardware: see docs/compile_matrix.md; fits v5p:2x4x4.
"""

from medusa_jax.training.settings import Backbone, Config, Data, Heads, Lora, Loss, Mesh, Optim, Run


def get_config() -> Config:
    """The run."""
    return Config(
        mode="medusa2",
        model=Backbone(path="lmsys/vicuna-33b-v1.3", shape="llama1-33b"),
        heads=Heads(number=5, layers=1),
        lora=Lora(rank=32, alpha=16.0, dropout=0.05),
        data=Data(
            train=("data/vicuna33b.jsonl",),
            template="vicuna",
            sequence_length=2048,
        ),
        loss=Loss(heads_weight=0.01, ramp="sine", distill=True, chunk=512),
        optim=Optim(
            learning_rate=1e-4,
            heads_multiplier=4.0,
            batch_size=128,
            accumulation=4,
            epochs=2,
            warmup_steps=20,
        ),
        mesh=Mesh(fsdp=-1),
        run=Run(save_every=100, eval_every=100),
    )
