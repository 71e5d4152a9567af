"""`python -m medusa_jax.tune`, and the trees that `--tree auto` finds."""

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from medusa_jax import tune as command
from medusa_jax.checkpoints.load import Model, load_model
from medusa_jax.decoding.acceptance import Greedy, Lossless
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.serving import tree_store
from medusa_jax.serving.generator import Generator
from medusa_jax.tuning import timing, tuner

FLAGS = ["--max_new_tokens", "24", "--sizes", "1", "3", "6", "--repeats", "4"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of tuned trees."""
    monkeypatch.setenv("MEDUSA_JAX_CACHE", str(tmp_path))
    return tmp_path


def flags_of(shared: Path, *more: str) -> list[str]:
    models = shared / "models"
    where = ["--model", str(models / "stories260K"), "--heads", str(models / "stories260K-medusa")]
    return [*where, *more]


def tune(flags: list[str]) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as done:
        command.main(flags)
    return int(done.value.code or 0)


def tuning(tree: Any, scheme: Any = None, batch_size: int = 1, **more: Any) -> dict[str, Any]:
    found = tree_store.describe(scheme or Greedy())
    return {"acceptance": found, "batch_size": batch_size, "tree": tree, "backend": "cpu"} | more


def found_tree(model: Model, scheme: Any, batch_size: int) -> Tree | DynamicTree:
    found = tree_store.find(model, scheme, batch_size, "float32")
    assert found is not None
    return tree_store.tree_of(found.tuning)


@pytest.mark.e2e
@pytest.mark.slow
def test_tunes_and_is_found_again(
    shared: Path,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(tuner, "FINAL", 1.0)  # however fast they are, all are timed again
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.01)
    prompts = home / "prompts.jsonl"
    texts = {"Once upon a time": "park", "One day, a girl": "girl", "Tom and Lily": ""}
    lines = [json.dumps({"prompt": text, "category": name}) for text, name in texts.items()]
    prompts.write_text("\n".join(lines))
    turns: list[str] = []
    seconds = timing.Stopwatch.seconds

    def counted(watch: timing.Stopwatch, name: str, tree: Any) -> float:
        turns.append(name)
        return seconds(watch, name, tree)

    monkeypatch.setattr(timing.Stopwatch, "seconds", counted)
    flags = flags_of(shared, "--prompts", str(prompts), *FLAGS)
    assert tune([*flags, "--minutes", "0"]) == 0  # time for the least that must be
    (path,) = (home / "trees").glob("*.json")
    (early,) = json.loads(path.read_text())["tunings"]
    measured = path.with_name(f"{path.name}.measured.jsonl")
    assert measured.exists() and not early["complete"]
    assert "the same command goes on" in capsys.readouterr().err
    coarse, fine, final = ["1", "3"], ["1", "6"], ["1", "3", "6", "6:2"]
    assert sorted(turns) == sorted([*coarse, *fine, *final] * timing.LEAST_ROUNDS)
    turns.clear()
    assert tune(flags) == 0
    assert sorted(turns) == sorted([*coarse, *fine] + final * (2 * 4 - timing.LEAST_ROUNDS))
    assert not measured.exists()
    out = capsys.readouterr()
    table = out.out
    assert all(f"tree {name}: " in out.err for name in final)  # as they come
    (made,) = json.loads(path.read_text())["tunings"]
    assert made["complete"] and made["accuracy"] == early["accuracy"] and not made["untimed"]
    shares = made["table"][2]["accepted_share_per_pos"]
    assert 1 > shares[0] >= shares[1] > 0
    assert 1 + sum(shares) == pytest.approx(made["table"][2]["mean_accepted_length"], abs=1e-3)
    categories = made["table"][2]["mean_accepted_length_by_category"]
    assert categories.keys() == {"park", "girl"} and all(one >= 1 for one in categories.values())
    assert [row["tree"] for row in made["table"]] == ["1", "3", "6", "6:2"]
    assert [row["nodes"] for row in made["table"]] == [1, 3, 6, 6]
    lengths = [row["mean_accepted_length"] for row in made["table"]]
    assert lengths[0] == 1 < lengths[1] < lengths[3] <= lengths[2]
    assert made["best"] == timing.choose(made["table"])
    assert len(made["tree"]) + 1 == made["best"]["nodes"]
    assert all(0 < sum(head) <= 1 for head in made["accuracy"])
    assert "| 6" in table and path.with_suffix(".png").stat().st_size > 1000
    models = shared / "models"
    found = Generator.load(models / "stories260K", models / "stories260K-medusa")
    assert found.tree == Tree.from_lists(made["tree"])


def rows_of(*figures: tuple[str, float, float]) -> list[dict]:
    names = ("tree", "tokens_per_second", "mean_accepted_length")
    return [dict(zip(names, row, strict=True)) for row in figures]


def test_among_equally_fast_trees_the_one_that_accepts_most_is_taken():
    rows = rows_of(("1", 100.0, 1.0), ("4", 200.0, 2.4), ("8", 197.0, 2.9), ("16", 190.0, 3.3))
    assert timing.choose(rows) == rows[2]


def test_no_tree_slower_than_plain_decoding_is_taken():
    rows = rows_of(("1", 100.0, 1.0), ("4", 99.5, 1.2), ("8", 99.0, 1.3))
    assert timing.choose(rows) == rows[0]
    rows[1]["tokens_per_second"] = 100.5  # now as fast as plain, and the 99 still slower
    assert timing.choose(rows) == rows[1]


def test_bad_flags(shared: Path, home: Path, capsys: pytest.CaptureFixture[str]):
    for flags, message in (
        (("--repeats", "0"), "--repeats must be at least 1, got 0"),
        (("--sizes", "0", "4"), "a tree has at least one token, got 0"),
    ):
        assert tune(flags_of(shared, *flags)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "none.jsonl", "directory", "output"])
def test_prompts_are_looked_at_before_a_model(
    home: Path, capsys: pytest.CaptureFixture[str], place: str
):
    """There is no model here; the output of an earlier run is no input, either."""
    path, expected = place and str(home / place), "--prompts"
    if place == "directory":
        path = str(home)
    if place == "output":
        (home / place).write_text('{"prompt": "a"}\n')
        expected = "which is read: give another file"
    flags = ["--model", "none", "--prompts", path, "--output", str(home / "output")]
    assert tune(flags) == 2
    assert expected in capsys.readouterr().err
    assert place != "output" or (home / place).read_text() == '{"prompt": "a"}\n'


def test_nearest_acceptance_then_batch_is_found(stories: Model, home: Path):
    path = tree_store.cache_file(stories, "float32")
    for tree, scheme, batch in (
        ([[0]], Greedy(), 1),
        ([[1]], Greedy(), 8),
        ([[2]], Lossless(1.0), 1),
        ({"size": 6, "depth": 3, "top_k": 4}, Lossless(0.5), 4),
    ):
        tree_store.save(path, tuning(tree, scheme, batch))

    def found(scheme: Any, batch: int) -> Tree | DynamicTree | None:
        return found_tree(stories, scheme, batch)

    assert found(Greedy(), 2) == Tree(((0,),))
    assert found(Greedy(), 16) == Tree(((1,),))
    assert found(Lossless(1.0), 64) == Tree(((2,),))
    assert found(Lossless(0.5), 1) == DynamicTree(6, 3, 4)
    assert tree_store.find(stories, Greedy(), 1, "bfloat16") is None
    other = dataclasses.replace(stories, fingerprint="of-another-model")
    assert tree_store.find(other, Greedy(), 1, "float32") is None


def test_a_second_tuning_replaces_the_first(stories: Model, home: Path):
    path = tree_store.cache_file(stories, "float32")
    tree_store.save(path, tuning([[0]]))
    tree_store.save(path, tuning([[0]], batch_size=4))
    tree_store.save(path, tuning([[1]]))
    assert [one["tree"] for one in tree_store.read(path)] == [[[0]], [[1]]]


def test_tunings_that_end_at_once_are_all_kept(home: Path):
    """Each reads the file, adds its own and writes it back."""
    path = home / "trees.json"
    sizes = range(1, 9)
    with ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(lambda size: tree_store.save(path, tuning([[0]], batch_size=size)), sizes))
    assert sorted(one["batch_size"] for one in tree_store.read(path)) == list(sizes)
    assert [file.name for file in home.iterdir()] == ["trees.json"]


def test_trees_that_come_with_a_model_serve_its_kind_of_device(stories: Model, home: Path):
    model = dataclasses.replace(stories, beside=home)
    brought = [tuning([[0], [1]], backend="tpu"), tuning([[0], [0, 0]])]
    (home / tree_store.BESIDE).write_text(json.dumps({"tunings": brought}))
    assert found_tree(model, Greedy(), 1) == Tree(((0,), (0, 0)))
    assert tree_store.find(model, Greedy(), 1, "float32", own_heads=False) is None


WRONG = {
    "'tunings'": [{"tunings": {"a": 1}}, {"tunings": [5]}, {"tunings": None}],
    "tuning 1: 'batch_size'": [0, "a", 1.5, 10**30],
    "tuning 1: 'backend'": [5, []],
    "tuning 1: 'acceptance'": ["Greedy", {"scheme": 5}, {}],
    "tuning 1: 'table'": [{"a": 1}, 5],
    "tuning 1: 'tree'": [
        {"size": "a", "depth": 3},
        {"size": 10**9, "depth": 3},
        {"size": 4, "depth": None},
        {"size": 4, "depth": 2, "top_k": 0},
        [[0], [10**30]],
        [[0], [float("nan")]],
        [[i] for i in range(4096)],
        [0],
        "ab",
        None,
    ],
}


@pytest.mark.parametrize("field", WRONG)
def test_wrong_values_are_refused_by_file_and_field(tmp_path: Path, field: str):
    for value in WRONG[field]:
        content = value
        if field != "'tunings'":
            content = {"tunings": [tuning([[0]]), tuning([[1]]) | {field.split("'")[1]: value}]}
        file = tmp_path / "trees.json"
        file.write_text(json.dumps(content))
        with pytest.raises(InputError) as error:
            tree_store.read(file)
        assert str(error.value).startswith(f"{file} is no file of tuned trees ({field}")
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([[0] * depth for depth in range(1, 7)], "6 deep"),
        ({"size": 8, "depth": 6}, "6 deep"),
        ([[512]], "rank 512"),
    ],
)
def test_a_tree_for_other_heads_is_refused_by_its_file(
    stories: Model, home: Path, tree: Any, message: str
):
    model = dataclasses.replace(stories, beside=home)
    (home / tree_store.BESIDE).write_text(json.dumps({"tunings": [tuning(tree)]}))
    with pytest.raises(InputError, match=rf"{tree_store.BESIDE}: 'tree': .*{message}"):
        tree_store.find(model, Greedy(), 1, "float32")


@pytest.mark.parametrize("content", ["nonsense", "[]", '{"tunings": [{"tree": [[0, 0]]}]}'])
def test_a_broken_file_is_named(stories: Model, home: Path, content: str):
    path = tree_store.cache_file(stories, "float32")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        tree_store.find(stories, Greedy(), 1, "float32")


def test_fingerprint_tells_weights_apart(stories: Model, shared: Path):
    models = shared / "models"
    merged = load_model(models / "stories260K-medusa-1.0")
    again = load_model(models / "stories260K", models / "stories260K-medusa")
    assert again.fingerprint == stories.fingerprint != merged.fingerprint
