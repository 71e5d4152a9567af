"""Steps compiled from shapes alone, for machines that are not here."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers.models import TINY
from helpers.paths import TESTS
from jax.experimental import topologies

from medusa_jax.distributed import topology
from medusa_jax.distributed.aot import DoesNotFit, compile_for
from medusa_jax.model.kv_cache import init_cache

# Simulated devices need a process of their own, which has not used JAX yet.
SCRIPT = """
import dataclasses, json
from helpers.models import TINY
from medusa_jax.bench.memory import MemoryOptions, bench
from medusa_jax.model.presets import PRESETS

PRESETS["tiny"] = TINY
every = {}
for mesh in ("tensor=1", "tensor=2"):
    found = bench(MemoryOptions(
        model="tiny", compile_only="cpu:4", mesh=mesh, heads_number=2,
        sizes=[8], batch_sizes=[2], prompt_tokens=16, max_length=60,
    ))
    every[mesh] = {name: dataclasses.asdict(one) for name, one in found.items()}
print(json.dumps(every))
"""


@pytest.mark.e2e
@pytest.mark.slow
def test_decoding_compiles_for_devices_that_are_not_here():
    """Over two devices each holds half the weights and half the cache, which stays in place."""
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cpu:4 (tensor=2), step of 8, batch 2: 0.00 GiB per device (arguments" in done.stdout
    every = json.loads(done.stdout.splitlines()[-1])
    one, two = every["tensor=1"], every["tensor=2"]
    assert list(one) == list(two) == ["prefill of 16, batch 2", "step of 8, batch 2"]
    cache = jax.eval_shape(lambda: init_cache(TINY, 2, 128, jnp.dtype("bfloat16")))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in (*cache.keys, *cache.values))
    for found, ways in ((one, 1), (two, 2)):
        step = found["step of 8, batch 2"]
        assert size / ways <= step["aliased"] < size / ways + 8192  # and the small state
        assert found["prefill of 16, batch 2"]["outputs"] >= size / ways
        assert step["outputs"] < 4096
    for name in one:
        assert 0.5 <= two[name]["arguments"] / one[name]["arguments"] < 0.6


def test_what_a_chip_has_no_room_for():
    """The sum is more than the chip has; or its compiler says so itself."""
    mesh = jax.make_mesh((1,), ("x",))

    def large():
        numbers = jax.ShapeDtypeStruct((5 * 2**30,), jnp.float32)
        return jax.jit(lambda x: x + 1).lower(numbers)

    with pytest.raises(DoesNotFit, match=r"^it: 42,949,672,960 bytes .* exceed 17,179,869,184$"):
        compile_for("v5e:2x2", "it", mesh, large)
    compile_for("v5p:2x2x1", "it", mesh, large)

    for said in (  # by the compiler for TPUs
        "Ran out of memory in memory space hbm. Used 26.54G of 15.75G hbm. Exceeded by 10.79G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (26.54G) exceeds "
        "available HBM (15.75G).",
    ):

        def refused(said: str = said):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}\n\nmore")

        with pytest.raises(DoesNotFit, match=r"^it: needs 26.54G per device, which has 15.75G$"):
            compile_for("v5e:2x2", "it", mesh, refused)


def test_bench_needs_a_shape_to_compile(capsys):
    from medusa_jax.bench.__main__ import main

    with pytest.raises(SystemExit) as done:
        main(["--compile_only", "v5e:2x2"])
    assert done.value.code == 2
    assert "the following arguments are required: --model" in capsys.readouterr().err


def test_a_host_has_no_more_chips_than_the_slice():
    names = "v5p:2x2x2", "v5e:4x4", "v5e:1x1", "v5p:1x1x1", "v5e:1x2"
    bounds = [2, 2, 1], [2, 2, 1], [1, 1, 1], [1, 1, 1], [1, 2, 1]
    assert tuple(map(topology.host_bounds, names)) == bounds


def test_several_processes_may_ask_the_compiler_of_an_absent_tpu(monkeypatch):
    """And it does not complain of a machine without one; what the machine has set stays."""
    asked: list[dict[str, str | None]] = []

    class Described:
        devices = ("one", "two")

    def described(*_: object, **__: object) -> Described:
        asked.append({name: os.environ.get(name) for name in topology.COMPILER_ONLY})
        return Described()

    for name in topology.COMPILER_ONLY:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(topologies, "get_topology_desc", described)
    assert topology.devices("v5e:1x2") == ["one", "two"]
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host")
    topology.devices("v5p:2x1x1")
    assert asked[0]["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert asked[1] == asked[0] | {"TPU_WORKER_HOSTNAMES": "host"}
