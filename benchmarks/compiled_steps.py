"""The table of docs/accelerators.md: what compilers of absent machines say of decoding steps.

    pip install -e '.[tpu,cuda]' && python benchmarks/compiled_steps.py --output out/steps

Needs no TPU and no GPU, but a few GB of memory and minutes a row. Each model and topology is a
process of its own, whose aot.json is kept: the script goes on where it was stopped.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from medusa_jax.bench.compiled_steps import NOTE, steps_table
from medusa_jax.cli import runner
from medusa_jax.files import check_directory
from medusa_jax.options import option

EXAMPLE = "python benchmarks/compiled_steps.py --output out/steps"
ROOT = Path(__file__).resolve().parents[1]
# Model, topology, devices of it that share the work, rows of a batch.
CASES = (
    ("llama2-7b", "v5p:1x1x1", 1, 1),
    ("llama2-7b", "h100", 1, 1),
    ("llama2-7b", "v5e:2x2", 4, 1),
    ("llama2-7b", "v6e:1x1", 1, 1),
    ("llama3-8b", "v6e:1x1", 1, 1),
    ("llama3-8b", "v5p:1x1x1", 1, 1),
    ("llama3-8b", "v5e:2x2", 4, 1),
    ("llama3-8b", "h100", 1, 1),
    ("llama2-7b", "v5p:1x1x1", 1, 16),
    ("llama2-7b", "v5e:2x2", 4, 16),
    ("llama2-7b", "v6e:1x1", 1, 16),
    ("llama3-8b", "v6e:1x1", 1, 16),
    ("llama3-8b", "v5p:1x1x1", 1, 16),
    ("llama3-8b", "v5e:2x2", 4, 16),
    ("llama2-7b", "h100", 1, 16),
    ("llama3-8b", "h100", 1, 16),
)
FLAGS = "--sizes 1 64 --heads_number 5 --max_length 2048 --dtype bfloat16"


@dataclasses.dataclass(kw_only=True)
class Options:
    """Where results are kept, and how many cases to do."""

    output: str = option(metavar="DIR", help="a directory for each case")
    most: int = option(len(CASES), least=1, help="cases, from the first on")


def compile_all(options: Options) -> None:
    """Compiles what is not done yet, and prints the table of all that is."""
    check_directory(options.output)
    tables = []
    for model, topology, devices, batch in CASES[: options.most]:
        place = Path(options.output, f"{model}-{topology.replace(':', '-')}-{batch}")
        if not (place / "aot.json").is_file():
            command = f"-m medusa_jax.bench steps --model {model} --compile_only {topology}"
            command += f" --mesh tensor={devices} --batch_sizes {batch} {FLAGS} --output {place}"
            place.parent.mkdir(parents=True, exist_ok=True)
            env = os.environ | {"JAX_PLATFORMS": "cpu"}
            subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=env, stdout=sys.stderr)
        if (place / "aot.json").is_file():
            tables += json.loads((place / "aot.json").read_text(encoding="utf-8"))
    print(f"{steps_table(tables)}\n\n{NOTE}")


def main() -> None:
    """The command line."""
    runner.command(compile_all, Options, __doc__ or "", EXAMPLE)


if __name__ == "__main__":
    main()
