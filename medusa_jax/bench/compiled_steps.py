"""What the compiler of a machine that is not here says of each decoding step.

    python -m medusa_jax.bench steps --compile_only v5p:1x1x1 --model llama2-7b --output out

A step is a pass of `Decoder.run`, the loop that decoding compiles, over parameters in the order
that `decoding.compilation` asks for. Shapes alone are compiled: no weight is read or made.
"""

import math
from pathlib import Path
from typing import Any

from medusa_jax import json_files
from medusa_jax.bench.memory import decoders_of
from medusa_jax.bench.synthetic import abstract_model
from medusa_jax.checkpoints.backbone import open_backbone
from medusa_jax.checkpoints.heads import head_file, open_heads
from medusa_jax.checkpoints.hub import resolve, shipped
from medusa_jax.decoding.compilation import abstract_state, compile_run, on_tpu
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.prefill import round_up
from medusa_jax.decoding.stats import step_bytes
from medusa_jax.distributed.aot import DoesNotFit, Memory, compile_within
from medusa_jax.distributed.hlo import Program
from medusa_jax.distributed.rules import HEADS, decode_mesh
from medusa_jax.distributed.topology import chip_bytes, devices
from medusa_jax.distributed.traffic import Traffic, traffic
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.presets import PRESETS
from medusa_jax.reports import number_cell, table

NOTE = (
    "Bytes of one device, in MB. Needed: weights, heads in use, and a cache that is full. Moved: "
    "what the loop's instructions read and write in the device's main memory. Cycles are the "
    "compiler's own estimate, for the comparison of programs."
)


def shapes_of(model: str | None, heads: str | None) -> tuple[ModelConfig, HeadsConfig | None]:
    """Shapes of a preset's or a directory's backbone, and of heads where there are any."""
    if model in PRESETS:
        return PRESETS[model], None
    directory = resolve(model or shipped())
    file = resolve(heads) if heads else head_file(directory)
    return open_backbone(directory).config, open_heads(file).config if file else None


def compile_steps(
    topology: str,
    model: str,
    config: ModelConfig,
    heads: HeadsConfig,
    *,
    sizes: list[int],
    batch_sizes: list[int],
    mesh: str,
    dtype: str,
    max_length: int | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """A record for each batch size and tree, as aot.json has it; also what does not fit.

    Args:
      topology: a name that `topology.devices` knows.
      model: its name, for the records.
      mesh: "tensor=N", devices of the topology that share the work.
      max_length: tokens of a row, all of which its cache holds.

    Raises:
      InputError: topology, mesh, sizes or `max_length` are wrong, or a compiler is missing.
    """
    places = decode_mesh(mesh, config, devices(topology))
    decoders = decoders_of(config, heads, places, sizes, max_length)
    params = abstract_model(config, heads, places, dtype=dtype)
    records, short = [], []
    for batch in dict.fromkeys(batch_sizes):
        for decoder in decoders:
            name = f"{topology} ({mesh}), step of {decoder.drafter.size}, batch {batch}"
            try:
                found: dict[str, Any] = {"topology": topology, "model": model, "mesh": mesh}
                found |= compile_step(decoder, params, batch, name)
            except DoesNotFit as error:
                short.append(str(error))
                print(error, flush=True)
                continue
            if (limit := chip_bytes(topology)) and found["memory_bytes"] > limit:
                short.append(f"{name}: {found['memory_bytes']:,} bytes exceed {limit:,}")
            records.append(found)
            print(f"{name}: {line(found)}", flush=True)
    return records, short


def compile_step(decoder: Decoder, params: Any, batch: int, name: str) -> dict[str, Any]:
    """What the compiler says of a step; bytes are those of one device."""
    state, mesh = abstract_state(decoder, params, batch), decoder.mesh
    assert mesh is not None
    program, seconds = compile_within(
        name, mesh, lambda: compile_run(decoder, params, state, open_order=on_tpu(params))
    )
    read = traffic(
        Program.parse(program.as_text()), score_elements(decoder, batch), filled_share(decoder)
    )
    tokens = batch * decoder.capacity
    return {
        "size": decoder.drafter.size,
        "batch": batch,
        "max_length": decoder.capacity,
        "needed_bytes": round(step_bytes(decoder, params, tokens)),
        **figures(read),
        "memory_bytes": Memory.of(program).total,
        "compile_seconds": round(seconds, 1),
    }


def score_elements(decoder: Decoder, batch: int) -> int:
    """Elements of a score for each row, head, token and slot of the cache, on one device."""
    shape = decoder.mesh.shape if decoder.mesh else {}
    heads = decoder.config.num_heads // math.prod(shape.get(axis, 1) for axis in HEADS)
    return batch * heads * decoder.drafter.size * decoder.cache_slots


def filled_share(decoder: Decoder) -> float:
    """Share of the slots of a full row that kernels read: the room behind them is empty."""
    from medusa_jax.kernels.cache_attention_tpu import SLOT_BLOCK  # a GPU's is smaller

    filled = round_up(decoder.capacity, SLOT_BLOCK)
    return min(1.0, filled / decoder.cache_slots)


def figures(read: Traffic) -> dict[str, Any]:
    """A step's traffic as aot.json has it."""
    kinds = ("weight copies", "weights", "cache", "scores", "partial sums", "rest")
    names = ("weight_copy", "weight", "cache", "score", "partial_sum", "other")
    found = {f"{name}_bytes": read.bytes[kind] for name, kind in zip(names, kinds, strict=True)}
    found["weight_copy_bytes"] += read.call_bytes["weight copies"]
    return {
        "moved_bytes": read.moved,
        **found,
        "call_bytes": read.call_bytes.total(),
        "kernels": read.kernels,
        "estimated_cycles": read.cycles,
    }


def line(record: dict[str, Any]) -> str:
    """A record in a line."""
    cycles = record["estimated_cycles"]
    return (
        f"moves {record['moved_bytes'] / 1e9:.2f} GB where {record['needed_bytes'] / 1e9:.2f} are "
        f"needed, {record['kernels']} kernels, "
        + (f"{cycles / 1e6:.1f} M cycles, " if cycles is not None else "")
        + f"compiled in {record['compile_seconds']:.0f} s"
    )


def steps_table(records: list[dict[str, Any]]) -> str:
    """Records as a Markdown table."""
    sizes = ("moved", "weight_copy", "score", "partial_sum")
    head = [
        "model",
        "topology",
        "batch",
        "tree",
        "needed",
        *(name.replace("_", " ") for name in sizes),
    ]
    head += ["moved over needed", "kernels", "M cycles", "GiB", "s"]
    cells = [
        [
            record["model"],
            record["topology"],
            str(record["batch"]),
            str(record["size"]),
            *(f"{record[f'{name}_bytes'] / 1e6:,.0f}" for name in ("needed", *sizes)),
            f"{record['moved_bytes'] / record['needed_bytes']:.2f}",
            str(record["kernels"]),
            number_cell(record["estimated_cycles"] and record["estimated_cycles"] / 1e6, "{:.1f}"),
            f"{record['memory_bytes'] / 2**30:.2f}",
            f"{record['compile_seconds']:.0f}",
        ]
        for record in records
    ]
    return table(head, cells)


def write(records: list[dict[str, Any]], output: str) -> None:
    """Prints the table, and writes aot.json into a directory."""
    print(f"\n{steps_table(records)}\n\n{NOTE}")
    directory = Path(output)
    directory.mkdir(exist_ok=True)
    json_files.write(directory / "aot.json", records)
