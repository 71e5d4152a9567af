"""`metrics.jsonl` and the clock behind its speed."""

import json
from pathlib import Path

import pytest

from medusa_jax.errors import InputError
from medusa_jax.training import clock, metrics
from medusa_jax.training.metrics import Metrics, read_lines


def strict(line: str) -> dict:
    """A line of valid JSON, which knows no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(line, parse_constant=refuse)


def test_what_is_not_finite_is_null(tmp_path: Path):
    with Metrics(tmp_path, [{"step": 0, "eval_loss": 2.0}], 0, 9, False, active=True) as made:
        made.write(1, {"loss": float("nan"), "head_top1": [0.5, float("inf")], "targets": 7})
    assert [strict(line) for line in (tmp_path / metrics.NAME).read_text().splitlines()] == [
        {"step": 0, "eval_loss": 2.0},
        {"step": 1, "loss": None, "head_top1": [0.5, None], "targets": 7},
    ]


def test_lines_of_later_steps_and_half_lines_are_left_out(tmp_path: Path):
    file = tmp_path / metrics.NAME
    file.write_text('{"step": 1}\n{"step": 3}\n{"step": 2, "é": "ü"}\n{"step": 2, "lo')
    assert read_lines(tmp_path, 2) == [{"step": 1}, {"step": 2, "é": "ü"}]
    assert read_lines(tmp_path, 0) == [] == read_lines(tmp_path / "no", 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00\n", "can't decode"),
        (b'{"step": 1}\n[]\n', "line 2: expected an object with a 'step'"),
        (b'{"step": "1"}\n', "line 1: expected an object"),
        (b"{}\n" * 2, "line 1: expected an object"),
    ],
)
def test_other_content_is_refused_by_name(tmp_path: Path, content: bytes, message: str):
    (tmp_path / metrics.NAME).write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        read_lines(tmp_path, 5)
    assert str(tmp_path / metrics.NAME) in str(refused.value)


class Result:
    """A step's array that is there at some second."""

    def __init__(self, now: list[float], at: float) -> None:
        self.now, self.at = now, at

    def is_ready(self) -> bool:
        return self.now[0] >= self.at


@pytest.mark.parametrize("at_once", [True, False], ids=["cpu", "accelerator"])
def test_each_step_has_its_own_speed(monkeypatch: pytest.MonkeyPatch, at_once: bool):
    """Steps of 2 s, and 10 s of saving after the third: each line says 50 tokens a second.

    A CPU computes while the step is dispatched, an accelerator while the host waits.
    """
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    made, rates = clock.Clock(100), []
    behind: Result | None = None
    ends = 0.0

    def report(result: Result) -> None:
        now[0] = max(now[0], result.at)
        rates.append(made.tick())
        made.restart()

    for step in range(1, 7):
        if behind is not None:
            made.look(behind)
        ends = max(now[0], ends) + 2
        if at_once:
            now[0] = ends
        if behind is not None:
            report(behind)
        behind = Result(now, ends)
        if step == 3:
            report(behind)
            behind = None
            with made.paused():
                now[0] += 10
    assert rates == pytest.approx([50.0] * 5)
