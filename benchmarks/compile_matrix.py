"""Bytes per device of training and decoding steps of real shapes, by the TPU's own compiler.

    pip install -e '.[tpu]' && python benchmarks/compile_matrix.py > docs/compile_matrix.md

Needs no TPU, but a few GB of memory and up to a minute a row. Each command is a process of its
own. What is done is kept in --log, so that the script goes on where it was stopped; rows that do
not fit, or fail, say why.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medusa_jax import cli
from medusa_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
TRAINING = (
    ("stories_medusa1", "cpu:1"),
    ("stories_medusa2", "cpu:1"),
    ("vicuna7b_medusa1", "v5e:4x4"),
    ("vicuna7b_medusa1", "v6e:2x4"),
    ("vicuna7b_medusa1", "v5p:2x2x2"),
    ("vicuna7b_medusa2", "v5e:4x4"),
    ("vicuna7b_medusa2", "v6e:2x4"),
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
    ("llama2-7b", "v5p:2x2x1", 1),
    ("llama2-7b", "v5e:2x2", 4),
    ("llama3-8b", "v6e:2x2", 1),
    ("llama2-13b", "v5e:2x4", 8),
    ("llama2-13b", "v5p:2x2x1", 1),
    ("llama1-33b", "v5e:2x4", 8),
    ("llama1-33b", "v6e:2x4", 8),
)
FUNCTION = re.compile(
    r"^(?P<name>[^:\n]+(?:: ?[^:\n]+)?): (?P<total>[\d.]+) GiB per device(?: of (?P<limit>\d+))? "
    r"\(arguments (?P<arguments>[\d.]+), temporaries (?P<temporaries>[\d.]+), "
    r"outputs (?P<outputs>[\d.]+), in place (?P<aliased>[\d.]+)\); compiled in (?P<seconds>\d+) s$",
    re.M,
)
