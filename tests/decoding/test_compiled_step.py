"""The program that users run: its decoding loop moves no cache and reads each weight once a step.

XLA's default passes, in a process of its own, since other tests compile with another generator.
The checks find what they look for: every way to spoil a small loop is reported.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import hlo
from helpers.environment import USERS_GENERATOR, default_passes
from helpers.paths import TESTS

CHILD = TESTS / "helpers/compiled_step.py"
B, K, C, S, D = 3, 2, 8, 192, 32


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Faults of each loop that the child compiled, for one device and for two."""
    out = tmp_path_factory.mktemp("compiled_step") / "found.json"
    env = default_passes() | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, CHILD, out], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("tree", ["root", "static", "dynamic"])
def test_the_loop_moves_no_cache_and_reads_each_weight_once(found, tree: str, devices: int):
    assert found[f"{tree} {devices}"] == []


@pytest.mark.e2e
@pytest.mark.slow
def test_a_draft_model_moves_no_cache(found):
    assert found["draft"] == []


@pytest.mark.e2e
@pytest.mark.slow
def test_a_step_that_may_write_before_it_reads_is_reported(found):
    """An acceptance that ignores the logits: XLA keeps the old cache in a copy."""
    assert any(fault.startswith("moves the cache: copy") for fault in found["blind"])


# --- the checks themselves, on a loop of one layer ---------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Small:
    """Keys [B, K, C, S], values [B, K, S, C], length [B] and hidden [B, D]."""

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    hidden: jax.Array


def small_step(params: dict[str, jax.Array], state: Small, spoil: str) -> Small:
    """Attends to the cache, then appends to it."""
    query = (state.hidden @ params["query"]).reshape(B, K, C)
    weights = jax.nn.softmax(jnp.einsum("bkc,bkcs->bks", query, state.keys))
    mixed = jnp.einsum("bks,bksc->bkc", weights, state.values)
    new = query if spoil == "writes before it reads" else mixed

    def append(slots: jax.Array, axis: int) -> jax.Array:
        write = lambda row, cell, start: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
            row, cell, start, axis
        )
        return jax.vmap(write)(slots, jnp.expand_dims(new, axis + 1), state.length)

    keys, values = append(state.keys, 2), append(state.values, 1)
    if spoil == "copies the values":
        values = jnp.roll(values, 1, axis=2)
    if spoil == "rewrites the keys":
        keys = keys * 1.01
    hidden = mixed.reshape(B, K * C) @ params["out"]
    if spoil == "reads a weight twice":
        hidden = jnp.tanh(hidden @ params["query"]) @ params["out"]
    if spoil == "prints":
        jax.debug.print("{}", hidden[0, 0])
    return Small(keys, values, state.length + 1, hidden)


def small_faults(spoil: str = "") -> list[str]:
    def loop(params: dict[str, jax.Array], state: Small) -> Small:
        return jax.lax.while_loop(
            lambda state: (state.length < 9).any(),
            lambda state: small_step(params, state, spoil),
            state,
        )

    donated = () if spoil == "keeps its argument" else "state"
    params = {"query": jnp.ones((D, K * C)), "out": jnp.ones((K * C, D))}
    state = Small(
        keys=jnp.zeros((B, K, C, S)),
        values=jnp.zeros((B, K, S, C)),
        length=jnp.zeros(B, jnp.int32),
        hidden=jnp.ones((B, D)),
    )
    lowered = jax.jit(loop, donate_argnames=donated).lower(params, state)
    compiled = lowered.compile(USERS_GENERATOR)
    return hlo.faults(compiled, (state.keys, state.values))


def test_a_good_loop_has_no_faults():
    assert small_faults() == []


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("writes before it reads", f"moves the cache: copy f32[{B},{K},{S},{C}]"),
        ("writes before it reads", f"moves the cache: copy f32[{B},{K},{C},{S}]"),
        ("copies the values", f"moves the cache: copy f32[{B},{K},{S},{C}]"),
        ("rewrites the keys", f"moves the cache: multiply f32[{B},{K},{C},{S}]"),
        ("reads a weight twice", "not one read a step: params['query'] {'dot': 2}"),
        ("prints", "exchanges data with the host: callback"),
        ("keeps its argument", "aliases 0 bytes of a cache of"),
    ],
)
def test_a_spoilt_loop_is_reported(spoil: str, expected: str):
    faults = small_faults(spoil)
    assert any(fault.startswith(expected) for fault in faults), faults


def test_only_what_is_spoilt_is_reported():
    """A cache whose values alone are copied says nothing of the keys."""
    faults = small_faults("copies the values")
    assert not any(f"[{B},{K},{C},{S}]" in fault for fault in faults), faults
