"""All that a GPU should be asked, in one call: bandwidth, decoding, prefill, training.

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --output gpu.json --parts steps --shapes llama2-13b

Needs one device, no model and no network: weights are random, so acceptance is not measured. The
file is written after each measurement, and what is in it already is not measured again: a time
limit costs the rest only. What fails, say for lack of memory, is written with its reason, and
tried again by the next call.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from medusa_jax.bench.report import BANDWIDTH, NO_ACCEPTANCE, spread_cell, steps_table, table
from medusa_jax.bench.summary import about, copy_bandwidth, spread
from medusa_jax.bench.synthetic import time_prefill, time_steps
from medusa_jax.checkpoints.tensors import read_json, write_json
from medusa_jax.cli import decoding_flags, runner
from medusa_jax.data.encoding import Encoded
from medusa_jax.data.loader import global_arrays
from medusa_jax.data.packing import Rows
from medusa_jax.distributed.aot import Memory
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.model.presets import PRESETS
from medusa_jax.training import settings
from medusa_jax.training.mesh import BATCH, make_mesh
from medusa_jax.training.setup import assemble
from medusa_jax.training.weights import load

PARTS = ("steps", "prefill", "train")
SIZES = (1, 8, 16, 32, 64)
Parts = Iterator[tuple[str, Callable[[], Any]]]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = runner.parser(__doc__ or "", "python benchmarks/gpu.py --output gpu.json")
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help="JSON, written part by part")
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--shapes", nargs="+", choices=PRESETS, default=("llama2-7b", "llama2-13b"))
    add("--train_shape", choices=PRESETS, default="llama2-7b")
    add("--batch_sizes", type=int, nargs="+", default=(1, 4, 16), help="of decoding")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--prompt_tokens", type=int, default=512, help="of the prefill")
    add("--new_tokens", type=int, default=32, help="of one timing of steps")
    add("--train_rows", type=int, default=4, help="rows of one training step")
    add("--train_tokens", type=int, default=2048, help="tokens of a row")
    add("--repeats", type=int, default=3)
    return parser.parse_args(arguments)


def main(flags: argparse.Namespace) -> None:
    """Measures what is not in the file yet, writes it, and prints it as Markdown."""
    decoding_flags.check_output(flags.output)
    file = Path(flags.output)
    report = read_json(file) if file.is_file() else {}
    if "copy_bandwidth" not in report:
        report = about() | {"dtype": flags.dtype, "copy_bandwidth": copy_bandwidth(), "parts": {}}
    if report["dtype"] != flags.dtype:
        raise InputError(f"{file} holds measurements in {report['dtype']}; give another --output")
    found = report["parts"]
    for name, measure in measurements(flags, report["copy_bandwidth"]):
        if name in found and "error" not in found[name]:
            continue
        begun = time.perf_counter()
        try:
            found[name] = {"rows": measure()}
        except jax.errors.JaxRuntimeError as error:
            found[name] = {"error": str(error).strip().splitlines()[0]}
        found[name]["seconds"] = time.perf_counter() - begun
        write_json(file, report)
        print(f"{name}: {found[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(markdown(report))


def measurements(flags: argparse.Namespace, bandwidth: float) -> Parts:
    """Names and what measures them. Training is first, the smaller one before the larger.

    The device's peak counts from the start of the process, so a smaller part would not be seen
    behind a larger one.
    """
    if "train" in flags.parts:
        for mode in ("medusa1", "medusa2"):
            yield (
                f"train {mode} {flags.train_shape}",
                lambda mode=mode: [time_training(flags, mode)],
            )
    for shape in flags.shapes:
        config = PRESETS[shape]
        heads = HeadsConfig(4, 1, config.hidden_size, config.vocab_size)
        model = (config, heads, flags.dtype)
        if "prefill" in flags.parts:
            yield (
                f"prefill {shape}",
                lambda model=model: time_prefill(
                    *model,
                    prompt_tokens=flags.prompt_tokens,
                    batch_sizes=flags.batch_sizes,
                    repeats=flags.repeats,
                ),
            )
        for batch in flags.batch_sizes if "steps" in flags.parts else ():
            yield (
                f"steps {shape}, batch {batch}",
                lambda model=model, batch=batch: time_steps(
                    *model,
                    sizes=SIZES,
                    batch_sizes=(batch,),
                    new_tokens=flags.new_tokens,
                    repeats=flags.repeats,
                    copy_bandwidth=bandwidth,
                ),
            )


def time_training(flags: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Steps on random tokens: ms, tokens/s, and bytes by the compiler and by the device."""
    config = settings.Config(
        mode=mode,
        model=settings.Backbone(shape=flags.train_shape, random=True, dtype=flags.dtype),
        data=settings.Data(sequence_length=flags.train_tokens),
        optim=settings.Optim(batch_size=flags.train_rows, warmup_steps=0),
        mesh=settings.Mesh(fsdp=1),
    )
    settings.check(config)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    weights = load(config, mesh)
    state, program = assemble(config, weights, mesh, steps=100)
    ids = np.random.default_rng(0).integers(
        0, weights.model.vocab_size, (flags.train_rows, flags.train_tokens), np.int32
    )
    pieces = [Encoded(row, np.ones(len(row), bool), "") for row in ids]
    rows = Rows(pieces, [[row] for row in range(len(pieces))], flags.train_tokens)
    batch = global_arrays(rows, np.arange(flags.train_rows)[None], NamedSharding(mesh, BATCH))
    compiled = program.step.lower(state, weights.frozen, batch).compile()
    times = []
    for _ in range(flags.repeats + 1):
        start = time.perf_counter()
        state, result = jax.block_until_ready(compiled(state, weights.frozen, batch))
        times.append(time.perf_counter() - start)
    assert np.isfinite(float(result.grad_norm))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "rows": flags.train_rows,
        "tokens": flags.train_tokens,
        "step_ms": spread([1e3 * one for one in times[1:]]),
        "tokens_per_second": spread([ids.size / one for one in times[1:]]),
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


if __name__ == "__main__":
    runner.run(main, parse())
