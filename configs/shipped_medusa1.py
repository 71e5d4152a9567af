"""Medusa-1 heads for the shipped model, on what it says itself.

    own() {
      python -m medusa_jax.distill --model runs/shipped_pretrain/model --autoregressive \\
          --data data/shipped/$2.jsonl --shard $3 --max_documents $4 --temperature $5 \\
          --batch_size 32 --output data/shipped/own_$1.jsonl
    }
    own greedy tales 1/3 12576 0
    own tales tales 2/3 12384 0.3
    own dialogues dialogues 0/1 300 0.3
    python train.py --config configs/shipped_medusa1.py --workdir runs/shipped_medusa1

Purpose: heads that know how this backbone goes on; on other people's text they learn less.
Recipe: the paper's loss (section 2.2.1) with self-distillation (2.3.2). Two blocks a head and the
lm_head for all: a projection of its own for each head would not fit the 32 MB it may have, nor
the time of a step.
Hardware: 2 CPU cores and 4 GB.
"""

from medusa_jax.training.settings import Backbone, Config, Data, Heads, Loss, Mesh, Optim, Run

DATA = "data/shipped"


def get_config() -> Config:
    """The run."""
    return Config(
        mode="medusa1",
        model=Backbone(path="runs/shipped_pretrain/model", dtype="float32", remat=False),
        heads=Heads(number=4, layers=2, shared=True),
        data=Data(
            train=tuple(f"{DATA}/own_{kind}.jsonl" for kind in ("greedy", "tales", "dialogues")),
            eval=(f"{DATA}/valid_tales.jsonl", f"{DATA}/valid_dialogues.jsonl"),
            eval_rows=64,
            sequence_length=512,
        ),
        loss=Loss(chunk=0),
        optim=Optim(
            learning_rate=5e-4,
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
