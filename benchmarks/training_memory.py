"""Bytes per device of every shipped config's training step, by the TPU's own compiler.

    pip install -e '.[tpu]' && python benchmarks/training_memory.py > docs/memory.md

Needs no TPU, but a few GB of memory and minutes a row. Rows that do not fit say so.
"""

import re
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]
ROWS = (
    ("stories_medusa1", "cpu:1"),
    ("stories_medusa2", "cpu:1"),
    ("vicuna7b_medusa1", "v5e:4x4"),
    ("vicuna7b_medusa1", "v5p:2x2x2"),
    ("vicuna7b_medusa2", "v5e:4x4"),
    ("vicuna7b_medusa2", "v5p:2x2x2"),
    ("vicuna13b_medusa1", "v5e:4x4"),
    ("vicuna13b_medusa2", "v5e:4x4"),
    ("vicuna13b_medusa2", "v5p:2x2x2"),
    ("vicuna33b_medusa2", "v5p:2x4x4"),
    ("zephyr7b_medusa2", "v5e:4x4"),
    ("llama3_8b_medusa1", "v5e:4x4"),
    ("qwen3_8b_medusa1", "v5e:4x4"),
)
LINE = re.compile(
    r"\((?P<mesh>data.*?)\): (?P<total>[\d.]+) GiB per device(?: of (?P<limit>\d+))? "
    r"\(arguments (?P<arguments>[\d.]+), temporaries (?P<temporaries>[\d.]+), .*; "
    r"compiled in (?P<seconds>\d+) s"
)
HEAD = """# Memory of the training step

GiB of one device, as XLA's TPU compiler counts them for the whole compiled step (weights,
optimizer state, batch and the most that is alive at once). No TPU was used:
`python train.py --config configs/NAME.py --compile_only TOPOLOGY` is each row, and
`benchmarks/training_memory.py` made the table (jax {version}).

| config | topology | mesh | per device | of | weights and state | temporaries |
|---|---|---|---|---|---|---|"""


def measure(config: str, topology: str) -> str:
    """One row of the table."""
    command = [sys.executable, "train.py", "--config", f"configs/{config}.py"]
    command += ["--compile_only", topology]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = LINE.search(done.stdout)
    if found is None:
        reason = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return f"| `{config}` | {topology} | | {reason[0]} | | | |"
    print(f"{config} {topology}: compiled in {found['seconds']} s", file=sys.stderr)
    cells = [f"`{config}`", topology, found["mesh"], found["total"], found["limit"] or "-"]
    return "| " + " | ".join([*cells, found["arguments"], found["temporaries"]]) + " |"


def main() -> None:
    """Prints the table."""
    print(HEAD.format(version=jax.__version__), flush=True)
    for config, topology in ROWS:
        print(measure(config, topology), flush=True)


if __name__ == "__main__":
    main()
