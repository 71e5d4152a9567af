"""Measurements that a later run goes on with, and those that it must not use."""

from pathlib import Path

import pytest

from medusa_jax.errors import InputError
from medusa_jax.tuning.journal import Journal

PURPOSE = {"model": "a", "sizes": (1, 2)}


def test_a_later_run_goes_on(tmp_path: Path):
    path = tmp_path / "measured.jsonl"
    with Journal(path, PURPOSE) as journal:
        journal.add({"text": 0})
        journal.add({"text": 1})
    with path.open("ab") as file:
        file.write(b'{"text": 2, "ra')  # a process was killed here
    with Journal(path, PURPOSE) as journal:
        assert journal.records == [{"text": 0}, {"text": 1}]
        journal.add({"text": 3})
    with Journal(path, PURPOSE) as journal:
        assert journal.records == [{"text": 0}, {"text": 1}, {"text": 3}]
        journal.remove()
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "nonsense\n", "[]\n", '{"for": 1}\n{"text": 9}\n'])
def test_measurements_for_something_else_are_replaced(tmp_path: Path, content: str):
    path = tmp_path / "measured.jsonl"
    path.write_text(content)
    with Journal(path, PURPOSE) as journal:
        assert journal.records == []
        journal.add({"text": 0})
    with Journal(path, PURPOSE) as journal:
        assert journal.records == [{"text": 0}]


def test_a_damaged_line_and_what_follows_it_are_measured_anew(tmp_path: Path):
    path = tmp_path / "measured.jsonl"
    with Journal(path, PURPOSE) as journal:
        for number in range(3):
            journal.add({"steps": {"plain": 0.1 * number}})
    path.write_text(path.read_text().replace('"plain": 0.1', '"plaim": 0.1'))
    with Journal(path, PURPOSE) as journal:
        assert journal.records == [{"steps": {"plain": 0.0}}]


def test_a_single_process_measures(tmp_path: Path):
    path = tmp_path / "measured.jsonl"
    with Journal(path, PURPOSE) as journal:
        journal.add({"text": 0})
        with pytest.raises(InputError, match="written by another process"):
            Journal(path, {"model": "b"})
    assert len(path.read_text().splitlines()) == 2
