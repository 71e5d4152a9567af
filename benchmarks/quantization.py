"""What quantized weights cost in quality: perplexity, and greedy texts beside those of floats.

    python benchmarks/quantization.py --model DIR --text FILE --prompts FILE --output out.json

The text is cut into windows, each read without what is before it. Texts are greedy, without
a tree, and go on past end-of-sequence: a text agrees up to the first token that differs.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from medusa_jax import json_files
from medusa_jax.bench.summary import about
from medusa_jax.checkpoints.hub import shipped
from medusa_jax.checkpoints.quantization import NONE, TYPES
from medusa_jax.cli import runner
from medusa_jax.data.prompts import read_requests
from medusa_jax.decoding.network import Network
from medusa_jax.drafting.drafter import Params
from medusa_jax.files import check_output
from medusa_jax.model.backbone import causal_mask
from medusa_jax.options import option
from medusa_jax.param_paths import device_bytes
from medusa_jax.progress import progress
from medusa_jax.reports import table
from medusa_jax.serving.conversations import Conversation
from medusa_jax.serving.engine import run_jobs
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.jobs import Job
from medusa_jax.serving.options import DecodingOptions

EXAMPLE = "python benchmarks/quantization.py --model DIR --text FILE --output out.json"


@dataclasses.dataclass(kw_only=True)
class Options(DecodingOptions):
    """What to read and to write."""

    text: str = option(metavar="FILE", help="plain text, read from its beginning")
    tokens: int = option(20_480, least=1, help="of the text")
    window: int = option(512, least=2, help="tokens of a window")
    prompts: str = option(str(shipped("prompts.jsonl")), metavar="FILE", help="JSON Lines, first "
        "turns (default: those that ship with the project)")  # fmt: skip
    number: int = option(20, least=1, help="prompts")
    max_new_tokens: int | None = option(64, least=1, help="of each text")
    batch_size: int = option(20, least=1, help="rows decoded together")
    precisions: list[str] = option([NONE, *TYPES], choices=(NONE, *TYPES), nargs="+",
        help="floats come first")  # fmt: skip
    output: str | None = option(None, metavar="FILE", help="JSON")


def losses(network: Network, params: Params, tokens: Int[Array, "B T"]) -> Array:
    """Cross-entropy of each next token [B, T - 1], in nats."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = network.hidden(params, tokens, positions, causal_mask(tokens.shape[1]), None)
    likely = jax.nn.log_softmax(network.logits(params, hidden[:, :-1]))
    return -jnp.take_along_axis(likely, tokens[:, 1:, None], axis=-1)[..., 0]


def perplexity(options: Options, generator: Generator) -> float:
    """Of the text's first tokens, window by window."""
    model, size = generator.model, options.window
    ids = generator.text.tokenizer.encode(Path(options.text).read_text(), add_special_tokens=False)
    ids = ids[: min(options.tokens, len(ids)) // size * size]
    run = jax.jit(losses, static_argnums=0)
    network, found = Network(model.config), []
    for start in progress(range(0, len(ids), size), label="perplexity", unit="windows"):
        window = jnp.asarray([ids[start : start + size]])
        found.append(float(run(network, model.params, window).mean()))
    return math.exp(statistics.mean(found))


def greedy(options: Options, generator: Generator) -> list[list[int]]:
    """Token ids of the texts after the prompts."""
    requests = itertools.islice(read_requests(options.prompts), options.number)
    prompts = [Conversation(request).ask(generator.text) for request in requests]
    jobs = [Job(ids, options.max_new_tokens or 1, (row, 0)) for row, ids in enumerate(prompts)]
    return [output.token_ids for output in run_jobs(generator.engine, jobs)]


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens up to the first that differs: (7 8 9) and (7 8 1) -> 2."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def bench(options: Options) -> None:
    """Measures, prints the table and writes the report."""
    check_output(options.output)
    rows: list[dict[str, Any]] = []
    reference: list[list[int]] = []
    for precision in options.precisions:
        own = dataclasses.replace(options, quantize=precision, autoregressive=True, ignore_eos=True)
        generator = load_generator(own, need_heads=False)
        texts = greedy(own, generator)
        reference = reference or texts
        same = [common(ours, theirs) for ours, theirs in zip(texts, reference, strict=True)]
        lengths = [len(text) for text in reference]
        rows.append(
            {
                "precision": generator.model.precision,
                "megabytes": device_bytes(generator.model.params) / 1e6,
                "perplexity": perplexity(own, generator),
                "equal_texts": sum(a == b for a, b in zip(same, lengths, strict=True)) / len(same),
                "common_prefix": statistics.mean(same),
            }
        )
        print(rows[-1], flush=True)
    names = ["weights", "MB", "perplexity", "equal texts", "equal tokens"]
    cells = [
        [row["precision"], f"{row['megabytes']:.0f}", f"{row['perplexity']:.2f}",
         f"{row['equal_texts']:.0%}", f"{row['common_prefix']:.1f}"]
        for row in rows
    ]  # fmt: skip
    print(table(names, cells))
    if options.output:
        chosen = {"model": str(options.model), "text": options.text, "window": options.window}
        json_files.write(Path(options.output), about() | chosen | {"rows": rows})


if __name__ == "__main__":
    runner.command(bench, Options, __doc__ or "", EXAMPLE)
