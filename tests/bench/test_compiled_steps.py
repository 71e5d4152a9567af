"""`bench steps --compile_only`: what aot.json says, and what a machine without compilers says."""

import json
import os
import subprocess
import sys

import jax
import pytest
from helpers.models import TINY
from helpers.paths import TESTS
from jax.experimental import topologies

from medusa_jax.bench import compiled_steps
from medusa_jax.bench.__main__ import main
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.distributed.rules import decode_mesh
from medusa_jax.distributed.topology import chip_bytes

# Simulated devices need a process of their own, which has not used JAX yet.
SCRIPT = """
import sys
from helpers.models import TINY
from medusa_jax.bench.__main__ import main
from medusa_jax.model.presets import PRESETS

PRESETS["tiny"] = TINY
main(sys.argv[1:])
"""
KEYS = {
    "topology", "size", "batch", "needed_bytes", "moved_bytes", "weight_copy_bytes", "score_bytes",
    "kernels", "estimated_cycles", "memory_bytes", "compile_seconds",
}  # fmt: skip


@pytest.mark.e2e
@pytest.mark.slow
def test_aot_json(tmp_path):
    """Over two devices each needs and moves half the weights; a full cache is part of a step."""
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    flags = ["--model", "tiny", "--sizes", "1", "8", "--batch_sizes", "2", "--heads_number", "2"]
    flags += ["--max_length", "60", "--compile_only", "cpu:2", "--mesh", "tensor=2"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "steps", *flags, "--output", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    plain, tree = json.loads((tmp_path / "out" / "aot.json").read_text())
    assert KEYS <= plain.keys() == tree.keys()
    assert (plain["size"], tree["size"], plain["batch"]) == (1, 8, 2)
    assert plain["estimated_cycles"] is None  # a CPU's compiler makes no estimate
    cached = 2 * TINY.num_layers * TINY.num_kv_heads // 2 * TINY.head_dim * 2 * 60 * 2
    assert cached < plain["needed_bytes"] < tree["needed_bytes"] < tree["memory_bytes"]
    assert plain["weight_bytes"] + cached >= plain["needed_bytes"] * 0.9
    assert plain["weight_copy_bytes"] == tree["weight_copy_bytes"] == 0
    assert 0 < plain["score_bytes"] < tree["score_bytes"]
    assert tree["moved_bytes"] / tree["needed_bytes"] > 1
    assert plain["kernels"] > TINY.num_layers
    assert "| tiny | cpu:2 | 2 | 8 | " in done.stdout


def test_scores_of_a_device():
    """Three rows, four heads, one token, and slots for 60 tokens and the last of a path."""
    mesh = decode_mesh("tensor=1", TINY, jax.devices()[:1])
    decoder = Decoder(TINY, capacity=60, mesh=mesh)
    assert compiled_steps.score_elements(decoder, 3) == 3 * TINY.num_heads * decoder.cache_slots


@pytest.mark.parametrize(("topology", "extra"), [("h100", "cuda"), ("v5p:1x1x1", "tpu")])
def test_a_missing_compiler(monkeypatch, tmp_path, capsys, topology, extra):
    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError(f"topology not implemented for {extra}")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(SystemExit) as done:
        main(["steps", "--model", "110m", "--compile_only", topology, "--output", f"{tmp_path}/o"])
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert f"not implemented for {extra}" in said
    assert f"pip install -e '.[{extra}]'" in said
    assert not (tmp_path / "o").exists()


def test_memory_of_a_gpu():
    assert chip_bytes("h100") == 84978434048
