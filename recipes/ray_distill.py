"""Self-distillation over machines: Ray Data spreads the shards of `medusa_jax.distill` on workers.

    pip install -e '.[ray]'
    python recipes/ray_distill.py --data chats.json.gz --output answers.jsonl --workers 8 --gpus 1

Each worker is a process with a model of its own, on any machine of the cluster (`ray start`). It
answers the inputs of its shards as `distill --shard I/N` does, into files beside the output that
all machines see. What a lost worker has written is continued by the next. In the end the records
of all shards are the output, in the order of the inputs.
"""

import dataclasses
import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medusa_jax.cli import runner
from medusa_jax.data.text_files import numbered_lines
from medusa_jax.errors import InputError, needs
from medusa_jax.files import Lines
from medusa_jax.options import option
from medusa_jax.serving.distill_options import DistillOptions
from medusa_jax.serving.distillation import distill

EXAMPLE = "python recipes/ray_distill.py --model DIR --data chats.json.gz --output answers.jsonl"


@dataclasses.dataclass(kw_only=True)
class RayOptions(DistillOptions):
    """What to ask, and by how many workers."""

    workers: int = option(2, least=1, help="processes that answer at once, each with a model")
    cpus: float = option(1.0, least=0, help="CPUs that Ray counts for a worker")
    gpus: float = option(0.0, least=0, help="GPUs of a worker")


def shard_options(options: RayOptions, number: int) -> DistillOptions:
    """Those of `distill` for a shard, with an output of its own."""
    own = {field.name for field in dataclasses.fields(DistillOptions)}
    chosen = {name: value for name, value in vars(options).items() if name in own}
    file = Path(f"{options.output}.{number}-of-{options.workers}").absolute()
    chosen |= {"output": str(file), "shard": f"{number}/{options.workers}"}
    return DistillOptions(**chosen)


def in_order(files: list[Path]) -> Iterator[str]:
    """Lines of all shards by the number of their input."""
    shards = [(line for _, line in numbered_lines(file)) for file in files]
    return heapq.merge(*shards, key=lambda line: json.loads(line)["input"])


def run(options: RayOptions) -> None:
    """Answers all shards, then writes the output.

    Raises:
      InputError: the output is there already, an option is not for shards, or what `distill`
        raises.
    """
    if options.minutes or options.questions:
        raise InputError("--minutes and --questions are for a single process: medusa_jax.distill")
    if Path(options.output).exists():
        raise InputError(f"{options.output} is there already: give another --output")
    with needs("ray"):
        import ray

    def answer(row: dict[str, Any]) -> dict[str, Any]:  # in a worker
        from medusa_jax.cli.compilation_cache import keep_programs

        keep_programs()
        distill(shard_options(options, int(row["id"])))
        return row

    shards = ray.data.range(options.workers, override_num_blocks=options.workers)
    shards.map(answer, num_cpus=options.cpus, num_gpus=options.gpus).materialize()
    files = [Path(shard_options(options, i).output) for i in range(options.workers)]
    with Lines(options.output) as lines:
        for line in in_order(files):
            lines.write(line.rstrip("\n"))


if __name__ == "__main__":
    runner.command(run, RayOptions, __doc__ or "", EXAMPLE)
