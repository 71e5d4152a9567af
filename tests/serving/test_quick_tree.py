"""The tree of a machine that nobody tuned on."""

import json
import re
from pathlib import Path

import pytest

from medusa_jax.checkpoints.hub import shipped
from medusa_jax.checkpoints.load import Model, load_model
from medusa_jax.decoding.acceptance import Greedy, Lossless
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.serving import quick_tree, tree_store
from medusa_jax.serving.quick_tree import auto_tree, predicted, probed, step_seconds


@pytest.fixture(scope="module")
def model() -> Model:
    """A model that brings tunings of its makers' machine."""
    return load_model(shipped(""))


class Clock:
    """Seconds of a step by the size of its tree, instead of real ones."""

    def __init__(self, growth: float) -> None:
        self.growth, self.calls = growth, 0

    def __call__(self, model, acceptance, batch_size, trees) -> list[float]:
        self.calls += 1
        return [1 + self.growth * (tree.size - 1) for tree in trees]


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of a fresh machine on which each token of a tree costs a tenth of a plain step."""
    monkeypatch.setenv("MEDUSA_JAX_CACHE", str(tmp_path))
    fake = Clock(0.1)
    monkeypatch.setattr(quick_tree, "step_seconds", fake)
    monkeypatch.setattr(tree_store, "device", lambda: "cpu of somebody else")
    return fake


def test_times_between_probes_are_interpolated():
    trees = [(Tree(((0,), (0, 0))), 2.0), (DynamicTree(5, 4), 3.0), (DynamicTree(64, 4), 9.0)]
    rows = predicted(trees, [1, 5], [1.0, 3.0])
    assert [(row["nodes"], row["step_seconds"]) for row in rows] == [(1, 1), (3, 2), (5, 3)]
    assert [row["tokens_per_second"] for row in rows] == [1, 1, 1]


def test_probes_are_near_the_sizes_and_accept_most():
    trees = [
        (DynamicTree(size, depth), float(depth)) for size in (4, 6, 16, 64) for depth in (2, 4)
    ]
    assert probed(trees) == [(Tree(), 1.0), (DynamicTree(6, 4), 4.0), (DynamicTree(16, 4), 4.0)]


def test_another_machines_tuning_is_timed_here_once(model: Model, clock: Clock, capsys):
    cheap = auto_tree(model, Greedy(), 1, "float32")
    assert cheap is not None and cheap.size > 1
    assert auto_tree(model, Greedy(), 1, "float32") == cheap
    assert clock.calls == 1
    assert capsys.readouterr().err.count("no tree was tuned for this machine") == 1
    # What was timed in haste is for this acceptance and batch alone.
    for acceptance, batch in ((Lossless(1.0), 1), (Greedy(), 8)):
        assert auto_tree(model, acceptance, batch, "float32") is not None
    assert clock.calls == 3


def test_where_each_token_costs_a_step_decoding_is_plain(model: Model, clock: Clock):
    clock.growth = 1.0
    assert auto_tree(model, Greedy(), 1, "float32") == Tree()


def test_products_and_precision_tell_tunings_apart(model: Model, clock: Clock):
    names = {tree_store.cache_file(model, dtype).name for dtype in ("float32", "int8")}
    names.add(tree_store.cache_file(load_model(shipped(""), kernels=False), "float32").name)
    products = {re.sub(".*somebody-else-", "", name) for name in names}
    kernel = tree_store.conditions(model, "float32")["products"]
    assert products == {f"{kernel}-float32.json", f"{kernel}-int8.json", "xla-float32.json"}


def test_a_tuning_of_an_earlier_release_is_another_machines(model: Model, clock: Clock):
    """It knows no products, and of its trees only the best."""
    now = tree_store.cache_file(model, "float32")
    now.parent.mkdir(parents=True)
    old = now.with_name(f"{model.fingerprint}-cpu-of-somebody-else-float32.json")
    tuning = {"acceptance": {"scheme": "Greedy"}, "batch_size": 1, "backend": "cpu"}
    best = {"nodes": 3, "mean_accepted_length": 2.5}
    tunings = [tuning | {"tree": [[0], [0, 0]], "best": best, "table": [best]}]
    old.write_text(json.dumps({"tunings": tunings}))
    assert auto_tree(model, Greedy(), 1, "float32", own_heads=False) == Tree(((0,), (0, 0)))
    clock.growth = 1.0
    assert auto_tree(model, Greedy(), 4, "float32", own_heads=False) == Tree()


@pytest.mark.slow
def test_steps_are_timed(model: Model):
    (plain, grown) = step_seconds(model, Greedy(), 2, [Tree(), DynamicTree(4, 2, 3)])
    assert 0 < plain < 10 and 0 < grown < 10
