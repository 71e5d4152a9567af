"""What is measured in which order: tasks of conversations, and systems in turn."""

import types
from pathlib import Path
from typing import Any

import pytest

from medusa_jax.bench import measure as bench_measure
from medusa_jax.bench.measure import Measurement, Task, groups_of, split
from medusa_jax.data.prompts import Request
from medusa_jax.decoding.stats import Stats
from medusa_jax.serving.conversations import Completion, Conversation
from medusa_jax.tuning.journal import Journal


def _answered(number: int, *prompts: list[int]) -> Conversation:
    """A conversation whose turns had these prompts."""
    completions = [Completion("", ids, "", [], [], 1.0, "length", 0.0) for ids in prompts]
    return Conversation(Request(("",) * len(prompts)), number, completions=completions)


def test_turns_are_tasks():
    """Conversation 4 has two turns, and 7 has one."""
    talks = [_answered(4, [1], [1, 2]), _answered(7, [3])]
    assert list(split("greedy", "qa", talks, batch_size=1)) == [
        Task("greedy", "qa", [[1]], [(4, 0)]),
        Task("greedy", "qa", [[1, 2]], [(4, 0)]),
        Task("greedy", "qa", [[3]], [(7, 0)]),
    ]
    assert list(split("greedy", "qa", talks, batch_size=2)) == [
        Task("greedy", "qa", [[1], [3]], [(4, 0), (7, 0)]),
        Task("greedy", "qa", [[1, 2]], [(4, 0)]),
    ]
    assert list(split("greedy", "qa", [_answered(1)], batch_size=8)) == []


def _measured(path: Path, monkeypatch: pytest.MonkeyPatch, over, repeats: int = 2):
    """What systems decode, by name and prompt, and the runs, of prompts (10) and (20)."""
    calls: list[tuple[str, int]] = []

    def system(name: str):
        def run(task: Task):
            calls.append((name, task.prompts[0][0]))
            return [[0]], [1], Stats(tokens=1, seconds=1.0)

        return run

    def tasks(generators, members, problems):
        return [Task("greedy", "qa", [[10 * (number + 1)]], [(number, 0)]) for number, _ in members]

    monkeypatch.setattr(bench_measure, "make_tasks", tasks)
    generator = types.SimpleNamespace(options=types.SimpleNamespace(batch_size=1))
    requests = [Request(("a",)), Request(("b",))]
    names = ("plain", "medusa", "hf")
    with Journal(path, {}) as journal:
        made = {"greedy": {name: system(name) for name in names}}
        asked: Any = {"greedy": {"medusa": generator}}
        measured = Measurement(asked, requests, lambda task: made, journal)
        for _ in measured.run(repeats, over):
            pass
    return calls, measured


def test_systems_take_turns(tmp_path, monkeypatch):
    """Each leads in its turn, task by task and repeat by repeat, after a pass of each that is
    left out."""
    calls, measured = _measured(tmp_path / "runs", monkeypatch, lambda: False)
    warm, timed = calls[:3], calls[3:]
    assert warm == [("plain", 10), ("medusa", 10), ("hf", 10)]
    assert timed == [
        ("plain", 10), ("medusa", 10), ("hf", 10),
        ("medusa", 20), ("hf", 20), ("plain", 20),
        ("medusa", 10), ("hf", 10), ("plain", 10),
        ("hf", 20), ("plain", 20), ("medusa", 20),
    ]  # fmt: skip
    assert [(run.task, run.repeat) for run in measured.runs[::3]] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
    ]
    assert measured.complete(2) and measured.whole_repeats == 2


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """Stopped after three of four tasks: one repeat is whole, and only the fourth is left."""
    left = iter([False, False, True])
    calls, measured = _measured(tmp_path / "runs", monkeypatch, lambda: next(left))
    assert len(calls) == 3 * (1 + 3)
    assert measured.whole_repeats == 1 and not measured.complete(2)
    calls, again = _measured(tmp_path / "runs", monkeypatch, lambda: False)
    assert calls[3:] == [("hf", 20), ("plain", 20), ("medusa", 20)]
    assert again.runs[:9] == measured.runs and again.complete(2)


def test_categories_take_turns():
    """So that a part of the prompts has all categories."""
    requests = [Request(category=category) for category in ("a", "a", "a", "b", "c", "c")]
    numbers = [[number for number, _ in group] for group in groups_of(requests, 1)]
    assert numbers == [[0], [3], [4], [1], [5], [2]]
    numbers = [[number for number, _ in group] for group in groups_of(requests, 8)]
    assert numbers == [[0, 1, 2], [3], [4, 5]]
