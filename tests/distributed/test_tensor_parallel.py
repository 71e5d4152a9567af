"""Decoding split over devices and processes writes what one device writes."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import pytest
from helpers.head_files import stored
from helpers.models import TINY
from helpers.paths import SCRIPT, SHARED, TESTS
from jax.sharding import PartitionSpec as P

from medusa_jax.checkpoints.load import load_model
from medusa_jax.distributed.rules import decode_mesh, spec
from medusa_jax.errors import InputError

CHILD = TESTS / "helpers/tensor_parallel.py"
MODELS = SHARED / "models"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the child made on eight simulated devices, by case."""
    out = tmp_path_factory.mktemp("tensor_parallel") / "found.json"
    real = [MODELS / "stories260K", MODELS / "stories260K-medusa"] if SHARED.is_dir() else []
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, CHILD, out, *real]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def check(case: dict[str, Any]) -> None:
    assert case["one"] == case["several"]
    assert len(case["one"]) == 3
    # The loop keeps the cache where it is, one key/value head of it on each device.
    assert case["kv_heads"] == 1
    assert case["copies"] == 0
    assert case["aliased"] >= case["cache_bytes"]
    # Two sums of hidden states a layer and one for the embedding, and nothing larger anywhere
    # than hidden states or, of one node a row, the features or the logits of all heads: no cache,
    # no weights.
    rows, nodes, width, vocab = 3, case["nodes"], case["width"], case["vocab"]
    sizes = [(kind, math.prod(shape)) for kind, shape in case["collectives"]]
    hidden = [kind for kind, size in sizes if size == rows * nodes * width]
    assert hidden == ["all-reduce"] * (2 * case["layers"] + 1)
    others = [size for _, size in sizes if size != rows * nodes * width]
    assert max(others) <= rows * max(case["heads"] * width, vocab)


@pytest.mark.e2e
@pytest.mark.slow
def test_as_many_heads_as_devices(found):
    check(found["multi_head"])
    # What a device reads of weights and cache; norms and the heads' biases are everybody's.
    assert found["multi_head"]["several_bytes"] < found["multi_head"]["one_bytes"] / 3.8


@pytest.mark.e2e
@pytest.mark.slow
def test_devices_that_share_key_value_heads_and_sample_with_grown_trees(found):
    check(found["grouped"])
    assert found["grouped"]["several_bytes"] < found["grouped"]["one_bytes"] / 6


@pytest.mark.e2e
@pytest.mark.slow
def test_gpus_read_their_heads_in_the_cache_of_all_layers(found):
    """Two devices of a group hold a key/value head each, and different query heads of it."""
    case = found["gpus"]
    assert case["one"] == case["several"] and case["kv_heads"] == 1


@pytest.mark.e2e
@pytest.mark.slow
def test_a_repetition_penalty_is_the_same_on_several_devices(found):
    case = found["grouped"]
    assert case["one_penalized"] == case["several_penalized"] != case["one"]


@pytest.mark.e2e
@pytest.mark.slow
def test_a_real_model_read_part_by_part(found, shared):
    case = found["stories"]
    check(case)
    assert max(case["one"][0]["tokens_per_step"]) > 2
    assert case["several_bytes"] < case["one_bytes"] / 5


@pytest.mark.e2e
@pytest.mark.slow
def test_two_processes_of_two_devices_write_one_file(run, tmp_path: Path):
    """The command line, with the model that comes along: 6 query heads, 2 key/value heads.

    Four devices divide neither, so two and two of them repeat each other's attention.
    """
    flags = ["--prompt", "Once upon a time", "--prompt", "Tom had a ball", "--max_new_tokens", "20"]
    (tmp_path / "tree.json").write_text("[[0], [1], [0, 0]]")
    flags += ["--tree", str(tmp_path / "tree.json")]
    code, text, _ = run(*flags, "--output", tmp_path / "one.jsonl")
    assert code == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    names |= {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    split = ["--mesh", "tensor=4"]
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *flags, *split, "--output", tmp_path / f"{number}.jsonl"],
            env=os.environ | names | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    (out, err), (other_out, other_err) = [one.communicate(timeout=280) for one in processes]
    assert [one.returncode for one in processes] == [0, 0], err + other_err
    assert out.endswith(text)  # gloo, which carries the sums between CPUs, talks before
    assert "mean accepted length" in err
    assert text.splitlines()[0] not in other_out
    assert "mean accepted length" not in other_err
    assert not (tmp_path / "1.jsonl").exists()
    assert records(tmp_path / "0.jsonl") == records(tmp_path / "one.jsonl")


def records(file: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == 2
    return [{key: one[key] for key in one if key != "seconds"} for one in found]


def test_parameters_of_a_mesh_are_those_of_one_device(saved: Path):
    alone, split = load_model(saved, kernels=False), load_model(saved, mesh="tensor=1")
    chex.assert_trees_all_equal(stored(split.params["backbone"]), stored(alone.params["backbone"]))
    assert split.fingerprint == alone.fingerprint
    assert split.mesh is not None and alone.mesh is None


class FakeMesh:
    """Sizes of the axes, which is all that `spec` asks for."""

    shape = {"tensor": 2, "group": 2}  # noqa: RUF012


def test_where_parameters_for_decoding_lie():
    def of(path: str, *shape: int) -> P:
        return spec(path, shape, FakeMesh(), "in_out")

    both = ("tensor", "group")
    assert of("backbone/layer_0/attention/query/weight", 32, 32) == P(None, both)
    assert of("backbone/layer_0/attention/key/weight", 32, 16) == P(None, "tensor")
    assert of("backbone/layer_0/attention/out/weight", 32, 32) == P(both, None)
    assert of("backbone/layer_0/mlp/down/weight", 48, 32) == P(both, None)
    assert of("backbone/lm_head", 32, 40) == P(None, both)
    assert of("heads/head_0/vocab", 32, 40) == P(None, both)
    assert of("heads/vocab", 32, 40) == P(None, both)
    assert of("heads/block_0/weight", 3, 32, 32) == P(None, None, both)
    assert spec("heads/block_0/bias", (3, 32), FakeMesh()) == P(None, None)
    assert spec("heads/token_map", (40,), FakeMesh()) == P(None)
    assert spec("backbone/embed/embedding", (40, 32), FakeMesh()) == P(both, None)
    # In the order [out, in] the same axes split the same dimension.
    assert spec("backbone/layer_0/mlp/down/weight", (32, 48), FakeMesh()) == P(None, both)
    # What four devices do not divide is split by two, or stays whole.
    assert of("backbone/lm_head", 32, 42) == P(None, "tensor")
    assert of("backbone/lm_head", 32, 41) == P(None, None)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "devices", "sizes"),
    [(8, 4, 8, (4, 2, 1)), (52, 52, 8, (4, 1, 2)), (6, 2, 6, (2, 3, 1)), (6, 2, 4, (2, 1, 2))],
)
def test_the_mesh_of_a_model(monkeypatch, heads: int, kv_heads: int, devices: int, sizes: tuple):
    """Sizes of tensor, group and copy; no head is ever cut."""
    monkeypatch.setattr("jax.make_mesh", lambda sizes, names, **_: dict(zip(names, sizes)))  # noqa: B905
    config = dataclasses.replace(TINY, num_heads=heads, num_kv_heads=kv_heads)
    mesh = decode_mesh(f"tensor={devices}", config, [object()] * devices)
    assert mesh == dict(zip(("tensor", "group", "copy"), sizes, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor=9", r"mesh tensor=9 needs 9 devices; there are 8 .*JAX_NUM_CPU_DEVICES=9"),
        ("tensor=0", r"mesh 'tensor=0': expected tensor=N"),
        ("data=4", r"mesh 'data=4': expected tensor=N"),
    ],
)
def test_meshes_that_cannot_be(text: str, message: str):
    with pytest.raises(InputError, match=message):
        decode_mesh(text, TINY, [object()] * 8)


def test_too_few_devices_is_said_on_the_command_line(run):
    code, out, err = run("--prompt", "Tom", "--mesh", "tensor=6")
    assert (code, out) == (2, "")
    assert "mesh tensor=6 needs 6 devices; there are 1" in err


def test_several_processes_do_not_chat(run, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    code, _, err = run("--chat", "--mesh", "tensor=2")
    assert code == 2
    assert "--chat: 2 processes decode together" in err
