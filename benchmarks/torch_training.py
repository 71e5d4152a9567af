"""A training step of Medusa-1 heads beside the same step as a plain loop of PyTorch.

    python benchmarks/torch_training.py --model MODEL --steps 10

Both train shared heads of one block on the same rows of random tokens, in float32, with AdamW and
a clipped gradient. PyTorch runs the backbone of transformers without gradients, with SDPA, and
the cross-entropy of each head over its truncated vocabulary. The two take turns. On a machine
that other programs use too, the least time of many steps says most.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from medusa_jax import json_files
from medusa_jax.bench.peers import torch_model
from medusa_jax.bench.summary import about
from medusa_jax.checkpoints.hub import resolve
from medusa_jax.cli import runner
from medusa_jax.data.encoding import Encoded
from medusa_jax.data.loader import Batches
from medusa_jax.data.packing import Rows
from medusa_jax.files import check_output
from medusa_jax.options import option
from medusa_jax.progress import progress
from medusa_jax.reports import table
from medusa_jax.training import settings
from medusa_jax.training.mesh import BATCH, make_mesh
from medusa_jax.training.objective import report
from medusa_jax.training.setup import assemble
from medusa_jax.training.weights import load, model_shape

EXAMPLE = "python benchmarks/torch_training.py --model smollm2"


@dataclasses.dataclass(kw_only=True)
class Options:
    """The work of a step, and how often both do it."""

    model: str = option(metavar="DIR", help="directory or GGUF file of the backbone, or smollm2")
    steps: int = option(10, least=2, help="steps of each")
    rows: int = option(4, least=1, help="rows of a step")
    length: int = option(512, least=8, help="tokens of a row")
    heads: int = option(4, least=1, help="heads")
    truncated: int = option(8192, least=1, help="tokens that a head guesses among")
    chunk: int = option(512, least=0, help="loss.chunk: positions whose logits exist at a time")
    output: str | None = option(None, metavar="FILE", help="JSON")


def config_of(options: Options) -> settings.Config:
    """The run that both are steps of."""
    return settings.Config(
        mode="medusa1",
        model=settings.Backbone(path=options.model, dtype="float32"),
        heads=settings.Heads(number=options.heads, shared=True, truncated=options.truncated),
        data=settings.Data(sequence_length=options.length),
        loss=settings.Loss(chunk=options.chunk),
        optim=settings.Optim(
            batch_size=options.rows, steps=1000, warmup_steps=0, schedule="constant"
        ),
        mesh=settings.Mesh(fsdp=1),
    )


def rows_of(config: settings.Config) -> Rows:
    """As many rows as a step takes, each a document of random tokens that are all learnt."""
    count, length = config.optim.batch_size, config.data.sequence_length
    vocab = model_shape(config).vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, (count, length)).astype(np.int32)
    pieces = [Encoded(row, np.ones(length, bool), "") for row in tokens]
    return Rows(pieces, [[number] for number in range(count)], length)


def ours(config: settings.Config, rows: Rows, token_map: list[int]) -> Callable[[], float]:
    """A step of this project; each call takes another, and gives the loss before it."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    weights = load(config, mesh, token_map)
    state, program = assemble(config, weights, mesh, config.optim.steps)
    sharding = NamedSharding(mesh, BATCH)
    batches = Batches(rows, config.optim.batch_size, config.optim.accumulation, 0, sharding)

    def step() -> float:
        nonlocal state
        state, result = program.step(
            state, weights.frozen, batches(int(state.step)), np.bool_(False)
        )
        return report(result.terms, 0.0, program.objective)["loss"]

    return step


def theirs(config: settings.Config, rows: Rows, token_map: list[int]) -> Callable[[], float]:
    """The same step as a loop of PyTorch."""
    import torch
    from torch.nn import functional

    model = torch_model(resolve(config.model.path), "float32")
    kept = torch.tensor(token_map)
    projection = model.lm_head.weight.detach()[kept]
    width, vocab = projection.shape[1], model.config.vocab_size
    blocks = [torch.nn.Linear(width, width) for _ in range(config.heads.number)]
    for block in blocks:
        torch.nn.init.zeros_(block.weight)
        torch.nn.init.zeros_(block.bias)
    params = [parameter for block in blocks for parameter in block.parameters()]
    rate = config.optim.learning_rate * config.optim.heads_multiplier
    rule = torch.optim.AdamW(params, lr=rate, weight_decay=config.optim.weight_decay)
    tokens = torch.tensor(np.stack([piece.ids for piece in rows.pieces])).long()
    places = torch.full((vocab,), -100)  # which cross_entropy leaves out
    places[kept] = torch.arange(len(kept))

    def step() -> float:
        with torch.no_grad():
            hidden = model.model(tokens, use_cache=False).last_hidden_state
        loss = torch.zeros(())
        for k, block in enumerate(blocks, start=1):
            read, targets = hidden[:, : -k - 1], places[tokens[:, k + 1 :]]
            logits = functional.linear(read + functional.silu(block(read)), projection)
            total = functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum"
            )
            loss = loss + config.loss.decay**k * total / targets.numel()
        rule.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, config.optim.clip)
        rule.step()
        return float(loss.detach())

    return step


def measure(options: Options) -> None:
    """Lets both take turns, and prints seconds a step and their ratio."""
    check_output(options.output)
    config = config_of(options)
    rows = rows_of(config)
    token_map = rows.most_frequent(options.truncated)
    steps = {"PyTorch": theirs(config, rows, token_map), "ours": ours(config, rows, token_map)}
    losses: dict[str, list[float]] = {name: [step()] for name, step in steps.items()}  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {name: [] for name in steps}
    for _ in progress(range(options.steps), unit="steps"):
        for name, step in steps.items():
            start, cpu = time.perf_counter(), time.process_time()
            losses[name].append(step())
            seconds[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - cpu)
    cells = [
        [name, f"{losses[name][0]:.5f}", f"{losses[name][-1]:.5f}", f"{min(seconds[name]):.2f}",
         f"{np.median(seconds[name]):.2f}", f"{min(busy[name]):.2f}"]
        for name in steps
    ]  # fmt: skip
    print(table(["", "first loss", "last loss", "least s", "median s", "least CPU s"], cells))
    ratios = {
        kind: min(times["PyTorch"]) / min(times["ours"])
        for kind, times in (("wall", seconds), ("cpu", busy))
    }
    print(f"\nours is {ratios['wall']:.2f} times as fast ({ratios['cpu']:.2f} in CPU seconds)")
    if options.output:
        found: dict[str, Any] = {"seconds": seconds, "cpu": busy, "losses": losses}
        json_files.write(Path(options.output), about() | found | {"ratios": ratios})


def main() -> None:
    """The command line."""
    runner.command(measure, Options, __doc__ or "", EXAMPLE)


if __name__ == "__main__":
    main()
