"""Medusa-2 of the shipped model: backbone and heads together, held to what the backbone was.

    python train.py --config configs/shipped_medusa2.py --workdir runs/shipped_medusa2

Purpose: the second of the paper's two stages (section 2.2.2), from the heads of the first.
Recipe: KL to the backbone as it was (section 2.3.2) on its own texts and, so that it keeps what it
knew, on some of those it learnt from; the heads learn 20 times as fast.
Hardware: 2 CPU cores and 4 GB.
"""

from medusa_jax.training.settings import (
    Backbone,
    Config,
    Data,
    Heads,
    Lora,
    Loss,
    Mesh,
    Optim,
    Run,
)

DATA = "data/shipped"
STORIES = f"{DATA}/stories.txt"


def get_config() -> Config:
    """The run."""
    return Config(
        mode="medusa2",
        model=Backbone(path="runs/shipped_pretrain/model", dtype="float32", remat=False),
        heads=Heads(number=4, layers=2, shared=True, path="runs/shipped_medusa1"),
        lora=Lora(rank=0),
        data=Data(
            # Its own texts, and stories that it learnt from.
            train=(
                *(f"{DATA}/own_{kind}.jsonl" for kind in ("greedy", "tales", "dialogues")),
                STORIES,
            ),
            eval=(f"{DATA}/valid_tales.jsonl", f"{DATA}/valid_dialogues.jsonl"),
            eval_rows=64,
            end="</s>",
            max_documents=2500,
            sequence_length=512,
        ),
        loss=Loss(heads_weight=0.03, distill=True, chunk=0),
        optim=Optim(
            learning_rate=1e-4,
            heads_multiplier=20.0,
            batch_size=4,
            accumulation=4,
            epochs=1,
            warmup_steps=40,
            beta2=0.99,
        ),
        mesh=Mesh(fsdp=1),
        run=Run(log_every=20, eval_every=0, save_every=200, export_dtype="bfloat16"),
    )
