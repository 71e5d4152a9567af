"""Bytes per device of training and decoding steps of real shapes, by the TPU's own compiler.

    pip install -e '.[tpu]' && python benchmarks/compile_matrix.py > docs/compile_matrix.md

Needs no TPU, but a few GB of memory and minutes a row. Each command is a process of its own, and
what it said is kept in --log: the script goes on where it was stopped. Rows that do not fit, or
fail, say why; what failed is tried again by the next call.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from medusa_jax.cli import runner
from medusa_jax.options import option
from medusa_jax.progress import progress

EXAMPLE = "python benchmarks/compile_matrix.py > docs/compile_matrix.md"
ROOT = Path(__file__).resolve().parents[1]
TRAINING = (
    ("stories_medusa1", "cpu:1"),
    ("stories_medusa2", "cpu:1"),
    ("vicuna7b_medusa1", "v5e:4x4"),
    ("vicuna7b_medusa1", "v5p:2x2x2"),
    ("vicuna7b_medusa2", "v5e:4x4"),
    ("vicuna7b_medusa2", "v6e:4x4"),
    ("vicuna7b_medusa2", "v5p:2x2x2"),
    ("vicuna13b_medusa1", "v5e:4x4"),
    ("vicuna13b_medusa2", "v5e:4x4"),
    ("vicuna13b_medusa2", "v6e:4x4"),
    ("vicuna13b_medusa2", "v5p:2x2x2"),
    ("vicuna33b_medusa2", "v5e:4x8"),
    ("vicuna33b_medusa2", "v6e:4x8"),
    ("vicuna33b_medusa2", "v5p:2x4x4"),
    ("zephyr7b_medusa2", "v5e:4x4"),
    ("llama3_8b_medusa1", "v5e:4x4"),
    ("qwen3_8b_medusa1", "v5e:4x4"),
)
# Shape, topology, chips of it that decode together.
DECODING = (
    ("llama2-7b", "v5e:2x2", 1),
    ("llama2-7b", "v6e:2x2", 1),
    ("llama2-7b", "v5e:2x2", 4),
    ("llama1-33b", "v6e:2x4", 8),
    ("llama1-33b", "v5e:2x4", 8),
    ("llama2-7b", "v5p:2x2x1", 1),
    ("llama3-8b", "v6e:2x2", 1),
    ("llama2-13b", "v5e:2x4", 8),
    ("llama1-33b", "v5p:2x2x1", 4),
    ("llama2-13b", "v5p:2x2x1", 1),
)
STEPS = "--sizes 1 64 --batch_sizes 1 16 --prompt_tokens 512 --max_length 2048 --dtype bfloat16"
FIGURES = ("total", "limit", "arguments", "temporaries", "outputs", "aliased")
LINE = re.compile(
    r"^(?P<name>\S+ \([^)]*\)(?:, (?P<what>[^,]*), batch (?P<batch>\d+))?): "
    r"(?:(?P<total>[\d.]+) GiB per device(?: of (?P<limit>\d+))? "
    r"\(arguments (?P<arguments>[\d.]+), temporaries (?P<temporaries>[\d.]+), "
    r"outputs (?P<outputs>[\d.]+), in place (?P<aliased>[\d.]+)"
    r"(?:, with its host (?P<offloaded>[\d.]+))?\); "
    r"compiled in (?P<seconds>\d+) s|(?P<short>needs .*))$",
    re.M,
)
HEAD = """# What fits where

Memory of one device in GiB, as XLA's TPU compiler counts it for the whole compiled function.
Arguments are weights, optimizer state or cache, and batch. Temporaries are the peak beside them.
Outputs are those without an argument's buffer. "In place" counts outputs that reuse one: state and
cache are donated, so each exists once. "Host" is what the host keeps for a device
(`model.offloaded`). No TPU was used, and these tables say nothing about speed.
`python benchmarks/compile_matrix.py` compiles all rows (jax {jax}). Seconds are compile times on a
shared machine; some include halts.
"""
TRAINING_HEAD = """
## Training steps

`python train.py --config configs/NAME.py --compile_only TOPOLOGY` is each row.

| config | topology | mesh | per device | of | arguments | temporaries | outputs | in place | host | s |
|---|---|---|---|---|---|---|---|---|---|---|"""  # noqa: E501
DECODING_HEAD = """
## Decoding

bfloat16, four heads, a cache of 2048 tokens a row. A prefill reads prompts of 512 tokens; a step
of 1 token is plain decoding, one of 64 verifies the tree `mc_sim_7b_63`. Each group of rows is
`python -m medusa_jax.bench memory --model SHAPE --compile_only TOPOLOGY --mesh tensor=N`
`{steps}`.

| shape | topology | chips | what | batch | per device | of | arguments | temporaries | outputs | in place | s |
|---|---|---|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


class Log:
    """What commands said, one JSON record a line; a command that is in it is not run again."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self._said: dict[str, Any] = {
            record["command"]: record for record in map(json.loads, lines)
        }

    def run(self, command: str) -> tuple[list[dict[str, str | None]], str]:
        """The lines of a command, taken apart, and, where it failed, its last words."""
        if command not in self._said:
            done = subprocess.run(
                [sys.executable, *command.split()],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            error = last if done.returncode else ""
            if error and "DoesNotFit" not in error:  # not fitting is a result, to be kept
                return [], error
            self._said[command] = {"command": command, "out": done.stdout, "error": error}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self._said[command]) + "\n")
        record = self._said[command]
        return [found.groupdict() for found in LINE.finditer(record["out"])], record["error"]


def rows(log: Log, command: str, cells: list[str], *, named: bool) -> list[str]:
    """Rows of a table: the cells, then the figures of each line that the command printed.

    Args:
      named: lines say what was compiled, and for which batch.
    """
    lines, error = log.run(command)
    table = []
    for line in lines:
        name = (
            [line["what"], line["batch"]] if named else [str(line["name"]).partition("(")[2][:-1]]
        )
        keys = (*FIGURES, "seconds") if named else (*FIGURES, "offloaded", "seconds")
        figures = [line[key] or "-" for key in keys]
        if line["limit"] and float(str(line["total"])) > float(line["limit"]):
            figures[0] += ", does not fit"
        if line["short"]:
            figures = [f"does not fit: {line['short']}", *[""] * (len(figures) - 1)]
        table.append([*cells, *name, *figures])
    if not table:
        table = [[*cells, *[""] * (1 + named), error.removeprefix("error: "), *[""] * (7 - named)]]
    return [f"| {' | '.join(map(str, row))} |" for row in table]


@dataclasses.dataclass(kw_only=True)
class Options:
    """Where results are kept."""

    log: str = option("compile_matrix.jsonl", metavar="FILE", help="what is done already")


def compile_all(options: Options) -> None:
    """Prints the tables."""
    log = Log(Path(options.log))
    with progress(total=len(DECODING) + len(TRAINING), unit="commands") as bar:
        decoding, training = [], []
        for shape, topology, chips in DECODING:
            command = f"-m medusa_jax.bench memory --model {shape} --compile_only {topology}"
            command += f" --mesh tensor={chips} {STEPS}"
            decoding += rows(log, command, [shape, topology, str(chips)], named=True)
            bar.update()
        for config, topology in TRAINING:
            command = f"train.py --config configs/{config}.py --compile_only {topology}"
            training += rows(log, command, [f"`{config}`", topology], named=False)
            bar.update()
    print(HEAD.format(jax=jax.__version__))
    print(
        "\n".join([TRAINING_HEAD.lstrip(), *training, DECODING_HEAD.format(steps=STEPS), *decoding])
    )


def main() -> None:
    """The command line."""
    runner.command(compile_all, Options, __doc__ or "", EXAMPLE)


if __name__ == "__main__":
    main()
