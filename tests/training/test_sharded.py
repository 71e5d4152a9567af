"""A step split over devices and processes gives what one device gives."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import TESTS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from medusa_jax.distributed.rules import spec
from medusa_jax.errors import InputError
from medusa_jax.training import settings
from medusa_jax.training.mesh import HIDDEN, check_batch, held_back, make_mesh, put_together

STEPS = TESTS / "helpers/training_steps.py"
# Of processes, and of devices in one: between them every axis is split alone or with others.
MESHES = ("8,1,1", "2,2,2")


def start(out: Path, *runs: str, devices: int, **env: str) -> subprocess.Popen:
    command = [sys.executable, str(STEPS), str(out), *runs]
    return subprocess.Popen(
        command,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"} | env,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        _, err = process.communicate(timeout=280)
        assert process.returncode == 0, err[-3000:]


def assert_same_step(found: Path, expected: Path) -> None:
    ours, theirs = np.load(found), np.load(expected)
    assert set(ours) == set(theirs)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_step_on_eight_devices_equals_one(tmp_path: Path):
    """Gradients of everything there is; of adapters, with KL to the teacher; of Hydra heads."""
    runs = ["full:1,8,1", "full:2,2,2", "lora:2,2,2", "hydra:2,2,2"]
    alone = [f"{mode}:1,1,1" for mode in ("full", "lora", "hydra")]
    finish(start(tmp_path / "step", *alone, *runs, devices=8))
    for run in runs:
        alone = f"step-{run.partition(':')[0]}:1,1,1.npz"
        assert_same_step(tmp_path / f"step-{run}.npz", tmp_path / alone)


@pytest.mark.e2e
@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    runs = [f"medusa1:{mesh}" for mesh in MESHES]
    finish(
        start(tmp_path / "one", "medusa1:1,1,1", devices=1),
        *(
            start(tmp_path / "two", *runs, devices=4, JAX_PROCESS_ID=str(i), **names)
            for i in range(2)
        ),
    )
    for run in runs:
        assert_same_step(tmp_path / f"two-{run}.npz", tmp_path / "one-medusa1:1,1,1.npz")


class FakeMesh:
    """Sizes of the axes, which is all that `spec` asks for."""

    shape = {"data": 2, "fsdp": 4, "tensor": 2}  # noqa: RUF012


def test_the_table_of_specs():
    def of(path: str, *shape: int) -> P:
        return spec(path, shape, FakeMesh())

    assert of("backbone/lm_head", 64, 32) == P("tensor", "fsdp")
    assert of("backbone/layers/mlp/down/weight", 3, 32, 64) == P(None, "fsdp", "tensor")
    assert of("backbone/layers/attention/query/bias", 3, 32) == P(None, "tensor")
    assert of("backbone/layers/mlp_norm/scale", 3, 32) == P(None, None)
    assert of("adapters/layers/mlp/up/b", 3, 64, 8) == P(None, "tensor", None)
    assert of("heads/head_0/vocab", 64, 32) == P("tensor", "fsdp")
    assert of("backbone/embed/embedding", 64, 32) == P(("tensor", "fsdp"), None)
    assert of("backbone/embed/embedding", 12, 32) == P("tensor", None)
    # An optimizer's moments lie with their parameter; a count is everywhere.
    assert of("opt_state/1/inner/mu/heads/head_0/vocab", 64, 32) == P("tensor", "fsdp")
    assert of("opt_state/1/inner/count") == P()
    # What an axis does not divide stays whole.
    assert of("backbone/lm_head", 63, 32) == P(None, "fsdp")
    with pytest.raises(InputError, match=r"no sharding rule for parameter surprise/matrix \[4\]"):
        of("surprise/matrix", 4)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (settings.Mesh(3, 1, 1), r"mesh \(data 3, fsdp 1, tensor 1\) needs 3 devices; there are 8"),
        (settings.Mesh(3, -1, 1), "needs a multiple of 3 devices; there are 8"),
        (settings.Mesh(-1, -1, 1), "one of which may be -1"),
        (settings.Mesh(0, 1, 1), "expected positive sizes"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices(mesh: settings.Mesh, message: str):
    with pytest.raises(InputError, match=message):
        make_mesh(mesh, [object()] * 8)


def test_weights_are_put_together_unless_they_stay_split():
    """On each device, before a loop; values and gradients are those of the weights alone."""
    hidden = NamedSharding(make_mesh(settings.Mesh(1, 1, 1), jax.devices()[:1]), HIDDEN)
    weights = {"vocab": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}

    def loss(weights: dict[str, jax.Array]) -> jax.Array:
        whole = put_together(weights, hidden)
        return jnp.sum(whole["vocab"] ** 2) + jnp.sum(whole["bias"])

    grads = jax.grad(loss)(weights)
    np.testing.assert_array_equal(grads["vocab"], 2 * weights["vocab"])
    np.testing.assert_array_equal(grads["bias"], weights["bias"])
    assert str(jax.make_jaxpr(loss)(weights)).count("sharding_constraint") == 1
    split: Any = SimpleNamespace(mesh=FakeMesh())
    for left in (None, split):
        assert put_together(weights, left) is weights


def test_what_is_held_back_is_multiplied_no_more_often():
    """The frozen side of a product gets no gradient by waiting together with the other."""
    weight, hidden = jnp.ones((4, 4)), jnp.ones((2, 4))

    def products(held: bool, argnums: Any) -> int:
        def loss(weight: jax.Array, hidden: jax.Array) -> jax.Array:
            if held:
                weight, hidden = held_back((weight, hidden), jnp.zeros(()))
            return jnp.sum((hidden @ weight) ** 2)

        found = jax.grad(loss, argnums)(weight, hidden)
        expected = jax.grad(lambda w, h: jnp.sum((h @ w) ** 2), argnums)(weight, hidden)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        return str(jax.make_jaxpr(jax.grad(loss, argnums))(weight, hidden)).count("dot_general")

    assert products(True, 0) == products(False, 0) == 2
    assert products(True, (0, 1)) == products(False, (0, 1)) == 3


def test_rows_that_do_not_divide_over_the_mesh():
    optim = settings.Optim(batch_size=12, accumulation=1)
    with pytest.raises(InputError, match=r"= 12 rows do not divide over .* = 8 devices"):
        check_batch(FakeMesh(), optim)
