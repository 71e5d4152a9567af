"""The settings that several recipes share. A recipe takes one and then sets its own fields.

`read_config` puts this directory on Python's search path while it runs a config file.
"""

from medusa_jax.training.settings import Backbone, Config, Data, Heads, Lora, Loss, Mesh, Optim, Run

SHIPPED_DATA = "data/shipped"
OWN = ("own_greedy.jsonl", "own_tales.jsonl", "own_dialogues.jsonl")


def medusa1(path: str, shape: str, template: str = "") -> Config:
    """Heads alone: stage 1 of the original's axolotl recipe (examples/medusa).

    Five heads learn at 4 x 5e-4 from 64 rows of 4096 tokens, for 2 epochs of ShareGPT.
    The backbone stays in bfloat16; the original quantizes it to 4 bits.
    """
    return Config(
        mode="medusa1",
        model=Backbone(path=path, shape=shape),
        heads=Heads(number=5, layers=1),
        data=Data(
            train=("Aeala/ShareGPT_Vicuna_unfiltered",), template=template, sequence_length=4096
        ),
        optim=Optim(learning_rate=5e-4, heads_multiplier=4.0, batch_size=64, accumulation=4),
        run=Run(save_every=100, eval_every=100),
    )


def shared_medusa1(path: str, shape: str) -> Config:
    """`medusa1` of heads that predict through the backbone's lm_head (the original's version 2)."""
    config = medusa1(path, shape)
    config.heads.shared = True
    config.loss.chunk = 256
    return config


def medusa2(path: str, shape: str, template: str, heads: str) -> Config:
    """Backbone and heads: stage 2 of the same recipe, from the heads of stage 1.

    LoRA 32/16, backbone 5e-4, heads 2e-3, lambda_0 = 0.2 constant.
    """
    config = medusa1(path, shape, template)
    config.mode = "medusa2"
    config.heads.path = heads
    config.lora = Lora(rank=32, alpha=16.0, dropout=0.05)
    config.loss = Loss(heads_weight=0.2, ramp="constant")
    return config


def self_distilled(path: str, shape: str, template: str, data: str) -> Config:
    """Medusa-2 in one stage on the model's own answers: the original's (examples/medusa).

    LoRA 32/16 on an unquantized backbone, backbone 1e-4, heads 4e-4. lambda_0 rises to 0.01
    over the whole run by a sine. 128 rows of 2048 tokens; KL to the backbone as it was.
    """
    config = medusa2(path, shape, template, heads="")
    config.data.train, config.data.sequence_length = (data,), 2048
    config.loss = Loss(heads_weight=0.01, ramp="sine", distill=True)
    config.optim.learning_rate = 1e-4
    config.optim.batch_size, config.optim.warmup_steps = 128, 20
    config.model.offloaded = ("input",)  # Zephyr on a v5e: 5.15 GiB a device, not 5.94
    return config


def on_a_cpu(path: str) -> Config:
    """Heads for a model so small that a CPU trains it: float32, one device, no chunks."""
    return Config(
        mode="medusa1",
        model=Backbone(path=path, dtype="float32", remat=False),
        loss=Loss(chunk=0),
        optim=Optim(heads_multiplier=4.0, batch_size=16, epochs=1, beta2=0.99),
        mesh=Mesh(fsdp=1),
        run=Run(log_every=20, eval_every=500, save_every=500),
    )


def shipped(path: str, train: tuple[str, ...]) -> Config:
    """Heads of the shipped model, from files of `SHIPPED_DATA` with these names.

    A head is two blocks before the lm_head of the backbone: a projection of its own
    would exceed the 32 MB that the model may have, and the time of a step.
    """
    config = on_a_cpu(path)
    config.heads = Heads(number=4, layers=2, shared=True)
    config.data = Data(
        train=tuple(f"{SHIPPED_DATA}/{name}" for name in train),
        eval=tuple(f"{SHIPPED_DATA}/valid_{name}.jsonl" for name in ("tales", "dialogues")),
        eval_rows=64,
        sequence_length=512,
    )
    config.optim.batch_size = config.optim.accumulation = 4
    config.run = Run(log_every=20, eval_every=0, save_every=200)
    return config


def stories(end: str = "<s>") -> Config:
    """Heads of a 260K-parameter TinyStories model and the texts beside a maintainer's checkout.

    Args:
      end: this model ends a story with the token that begins the next.
    """
    config = on_a_cpu("../shared/models/stories260K")
    texts = ("tinystories_val", "tinystories_a", "tinystories_b")
    config.data = Data(
        train=tuple(f"../shared/text/{name}.txt" for name in texts),
        eval=("../shared/text/tinystories_test.txt",),
        eval_rows=128,
        end=end,
        sequence_length=256,
    )
    return config
