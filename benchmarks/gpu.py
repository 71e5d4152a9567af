"""Measures a GPU in a single call: copy bandwidth, decoding steps, prefill, training steps.

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --output gpu.json --parts steps --shapes llama2-13b

Needs one device, no model and no network: weights are random, so acceptance is not measured. The
file is written after each measurement, and what is in it already is not measured again: a time
limit costs the rest only. What fails, say for lack of memory, is written with its reason, and
tried again by the next call.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from medusa_jax import json_files
from medusa_jax.bench.report import BANDWIDTH, NO_ACCEPTANCE, steps_table
from medusa_jax.bench.summary import about, copy_bandwidth, spread
from medusa_jax.bench.synthetic import random_model
from medusa_jax.bench.timing import time_prefill, time_steps
from medusa_jax.cli import runner
from medusa_jax.data.encoding import Encoded
from medusa_jax.data.loader import global_arrays
from medusa_jax.data.packing import Rows
from medusa_jax.distributed.aot import Memory
from medusa_jax.drafting.drafter import Params
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.files import check_output
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.presets import PRESETS
from medusa_jax.options import option
from medusa_jax.reports import spread_cell, table
from medusa_jax.training import settings
from medusa_jax.training.mesh import BATCH, make_mesh
from medusa_jax.training.setup import assemble
from medusa_jax.training.weights import load

PARTS = ("steps", "prefill", "train")
SIZES = (1, 8, 16, 32, 64)
Parts = Iterator[tuple[str, Callable[[], Any]]]


EXAMPLE = "python benchmarks/gpu.py --output gpu.json"


@dataclasses.dataclass(kw_only=True)
class Options:
    """What to measure, and on which shapes."""

    output: str = option(metavar="FILE", help="JSON, written part by part")
    parts: list[str] = option(list(PARTS), nargs="+", choices=PARTS, help="what to measure")
    shapes: list[str] = option(["llama2-7b", "llama2-13b"], nargs="+", help=", ".join(PRESETS))
    train_shape: str = option("llama2-7b", help="of the training step")
    batch_sizes: list[int] = option([1, 4, 16], least=1, nargs="+", help="of decoding")
    dtype: str = option("bfloat16", choices=("float32", "bfloat16"), help="of all parameters")
    prompt_tokens: int = option(512, least=1, help="of the prefill")
    new_tokens: int = option(32, least=1, help="steps of a timing")
    train_rows: int = option(4, least=1, help="rows of a training step")
    train_tokens: int = option(2048, least=1, help="tokens of a row")
    repeats: int = option(3, least=1, help="times that each part is timed")


def measure(options: Options) -> None:
    """Measures what is not in the file yet, writes it, and prints it as Markdown."""
    check_output(options.output)
    if unknown := {*options.shapes, options.train_shape} - PRESETS.keys():
        raise InputError(f"unknown shapes {sorted(unknown)}; expected {', '.join(PRESETS)}")
    file = Path(options.output)
    report = json_files.read_object(file) if file.is_file() else {}
    if "copy_bandwidth" not in report:
        report = about() | {"dtype": options.dtype, "copy_bandwidth": copy_bandwidth(), "parts": {}}
    if report["dtype"] != options.dtype:
        raise InputError(f"{file} holds measurements in {report['dtype']}; give another --output")
    done = report["parts"]
    for name, part in parts(options, report["copy_bandwidth"]):
        if name in done and "error" not in done[name]:
            continue
        start = time.perf_counter()
        try:
            done[name] = {"rows": part()}
        except jax.errors.JaxRuntimeError as error:
            done[name] = {"error": str(error).strip().splitlines()[0]}
        done[name]["seconds"] = time.perf_counter() - start
        json_files.write(file, report)
        print(f"{name}: {done[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(markdown(report))


def parts(options: Options, bandwidth: float) -> Parts:
    """Names and what measures them. Training is first, the smaller mode before the larger.

    The device's peak counts from the start of the process, so a smaller part would not be seen
    behind a larger part.
    """
    if "train" in options.parts:
        for mode in ("medusa1", "medusa2"):
            train = functools.partial(time_training, options, mode)
            yield f"train {mode} {options.train_shape}", lambda train=train: [train()]
    for shape in options.shapes:
        if "prefill" in options.parts:
            yield f"prefill {shape}", functools.partial(prefill_rows, options, shape)
        for batch in options.batch_sizes if "steps" in options.parts else ():
            steps = functools.partial(step_rows, options, shape, batch, bandwidth)
            yield f"steps {shape}, batch {batch}", steps


def random_parts(options: Options, shape: str) -> tuple[ModelConfig, HeadsConfig, Params]:
    """A backbone of random weights with four random heads."""
    config = PRESETS[shape]
    heads = HeadsConfig(4, 1, config.hidden_size, config.vocab_size)
    return config, heads, random_model(config, heads, options.dtype)


def prefill_rows(options: Options, shape: str) -> list[dict[str, Any]]:
    """The time of a prefill for each batch size."""
    return time_prefill(
        *random_parts(options, shape),
        prompt_tokens=options.prompt_tokens,
        batch_sizes=options.batch_sizes,
        repeats=options.repeats,
    )


def step_rows(options: Options, shape: str, batch: int, bandwidth: float) -> list[dict[str, Any]]:
    """The time of a step for each size of a tree."""
    return time_steps(
        *random_parts(options, shape),
        sizes=SIZES,
        batch_sizes=(batch,),
        steps=options.new_tokens,
        repeats=options.repeats,
        copy_bandwidth=bandwidth,
    )


def time_training(options: Options, mode: str) -> dict[str, Any]:
    """Steps on random tokens: ms, tokens/s, and bytes by the compiler and by the device."""
    config = settings.Config(
        mode=mode,
        model=settings.Backbone(shape=options.train_shape, random=True, dtype=options.dtype),
        data=settings.Data(sequence_length=options.train_tokens),
        optim=settings.Optim(batch_size=options.train_rows, warmup_steps=0),
        mesh=settings.Mesh(fsdp=1),
    )
    settings.check(config)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    weights = load(config, mesh)
    state, program = assemble(config, weights, mesh, steps=100)
    ids = np.random.default_rng(0).integers(
        0, weights.model.vocab_size, (options.train_rows, options.train_tokens), np.int32
    )
    pieces = [Encoded(row, np.ones(len(row), bool), "") for row in ids]
    rows = Rows(pieces, [[row] for row in range(len(pieces))], options.train_tokens)
    batch = global_arrays(rows, np.arange(options.train_rows)[None], NamedSharding(mesh, BATCH))
    compiled = program.step.lower(state, weights.frozen, batch, False).compile()
    first = compiled(state, weights.frozen, batch, False)  # slower than the others
    state, result = jax.block_until_ready(first)
    times = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        state, result = jax.block_until_ready(compiled(state, weights.frozen, batch, False))
        times.append(time.perf_counter() - start)
    assert np.isfinite(float(result.grad_norm))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "rows": options.train_rows,
        "tokens": options.train_tokens,
        "step_ms": spread([1e3 * seconds for seconds in times]),
        "tokens_per_second": spread([ids.size / seconds for seconds in times]),
        "compiled_bytes": dataclasses.asdict(Memory.of(compiled)),
        "peak_bytes": peak,
    }


def markdown(report: dict[str, Any]) -> str:
    """What was measured, as tables."""
    device = report["device"] if report["platform"] != "cpu" else report["cpu"]
    lines = [
        f"{device}, {report['dtype']}, jax {report['jax']}, {report['date']}; copy bandwidth "
        f"{report['copy_bandwidth'] / 1e9:.0f} GB/s. {NO_ACCEPTANCE}"
    ]
    done = {name: part["rows"] for name, part in report["parts"].items() if "rows" in part}
    train = [(name, row) for name, rows in done.items() if name.startswith("train") for row in rows]
    if train:
        head = ["training step", "rows", "tokens", "ms", "tokens/s", "GiB, compiler", "GiB, peak"]
        cells = [
            [
                name.removeprefix("train "),
                str(row["rows"]),
                str(row["tokens"]),
                spread_cell(row["step_ms"], "{:.1f}"),
                spread_cell(row["tokens_per_second"], "{:.0f}"),
                f"{Memory(**row['compiled_bytes']).total / 2**30:.2f}",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
            ]
            for name, row in train
        ]
        lines.append(table(head, cells))
    prefill = [(n, row) for n, rows in done.items() if n.startswith("prefill") for row in rows]
    if prefill:
        cells = [
            [name, str(row["batch_size"]), str(row["tokens"]), spread_cell(row["ms"], "{:.1f}")]
            for name, row in prefill
        ]
        lines.append(table(["prefill", "batch", "tokens", "ms"], cells))
    steps: dict[str, list[Any]] = {}
    for name, rows in done.items():
        if name.startswith("steps"):
            steps.setdefault(name.partition(",")[0], []).extend(rows)
    for name, rows in steps.items():
        lines += [f"### {name}", steps_table(rows)]
    if steps:
        lines.append(BANDWIDTH)
    lines += [f"{n}: {p['error']}" for n, p in report["parts"].items() if "error" in p]
    return "\n\n".join(lines)


def main() -> None:
    """The command line."""
    runner.command(measure, Options, __doc__ or "", EXAMPLE)


if __name__ == "__main__":
    main()
