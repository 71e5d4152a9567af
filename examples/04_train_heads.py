"""Train heads on what the model itself says, then decode with them.

Self-distillation in one file: the shipped model answers prompts, new heads learn from the answers.
So few answers and steps make weak heads; configs/quickstart_medusa1.py trains longer.

    python examples/04_train_heads.py
"""

import json
import tempfile
from pathlib import Path

import medusa_jax
from medusa_jax import Generator
from medusa_jax.training.settings import Backbone, Config, Data, Heads, Loss, Mesh, Optim, Run
from medusa_jax.training.trainer import train

SHIPPED = Path(medusa_jax.__file__).parent / "shipped"


def answers(path: Path, count: int = 16) -> None:
    """Writes the model's answers as ShareGPT records."""
    lines = (SHIPPED / "prompts.jsonl").read_text().splitlines()[:count]
    prompts = [json.loads(line)["prompt"] for line in lines]
    completions = Generator.load(batch_size=8).generate(prompts, max_new_tokens=96)
    with path.open("w") as file:
        for prompt, completion in zip(prompts, completions, strict=True):
            turns = [("human", prompt), ("gpt", completion.text)]
            record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
            file.write(json.dumps(record) + "\n")


def config(data: Path) -> Config:
    """Four heads of one block through the backbone's lm_head, 10 steps."""
    return Config(
        mode="medusa1",
        model=Backbone(path=str(SHIPPED), dtype="float32", remat=False),
        heads=Heads(number=4, layers=1, shared=True),
        data=Data(train=(str(data),), eval_fraction=0.1, sequence_length=128),
        loss=Loss(chunk=0),
        optim=Optim(learning_rate=2e-3, batch_size=4, steps=10, warmup_steps=3),
        mesh=Mesh(fsdp=1),
        run=Run(log_every=5, eval_every=0, save_every=0, tensorboard=False),
    )


def main() -> None:
    """Writes answers, trains, and decodes with the new heads."""
    with tempfile.TemporaryDirectory() as directory:
        data, workdir = Path(directory, "answers.jsonl"), Path(directory, "run")
        answers(data)
        train(config(data), str(workdir))
        generator = Generator.load(heads=str(workdir / "heads"), tree="grow:8")
        completion = generator.generate(["Once upon a time"], max_new_tokens=64)[0]
        print(f"{completion.text}\n[{completion.mean_accepted_length:.2f} tokens a step]")


if __name__ == "__main__":
    main()
