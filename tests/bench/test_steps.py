"""`python -m medusa_jax.bench steps`: times that a clock by hand gives, and what is written."""

import json
import types
from pathlib import Path
from typing import Any

import pytest

from medusa_jax.bench import steps, summary, timing
from medusa_jax.bench.__main__ import main
from medusa_jax.bench.timing import room, time_steps, trees
from medusa_jax.checkpoints.backbone import open_backbone
from medusa_jax.drafting.drafter import NoDraft
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.presets import PRESETS

TIED = ModelConfig(48, 16, 32, 1, 2, 2, 8, 64, tied=True)


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setattr(steps, "copy_bandwidth", lambda: summary.copy_bandwidth(4096))


def _run(output: Path, *flags: object) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """bench.json and steps.json of a run that succeeds."""
    with pytest.raises(SystemExit) as done:
        main([*map(str, flags), "--output", str(output)])
    assert done.value.code == 0
    report, records = ((output / f"{name}.json").read_text() for name in ("bench", "steps"))
    return json.loads(report), json.loads(records)


def _same_rows(report: dict[str, Any], records: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(batch, size) of the records, which say what the report's rows say."""
    assert len(records) == len(report["rows"])
    for row, record in zip(report["rows"], records, strict=True):
        assert record.keys() == {"size", "batch", "seconds", "over_plain"}
        assert 1e3 * record["seconds"] == pytest.approx(row["step_ms"]["median"])
        assert record["seconds"] > 0
        assert record["size"] > 1 or record["over_plain"] == 1
    return [(record["batch"], record["size"]) for record in records]


@pytest.mark.e2e
@pytest.mark.slow
def test_random_weights(monkeypatch, tmp_path, capsys):
    """Tied weights and shared heads, by the flags of an older command line."""
    monkeypatch.setitem(PRESETS, "tiny", TIED)
    flags = ["--shared_heads", "--sizes", 4, 1, 4, "--batch_sizes", 2, "--heads_number", 2]
    flags += ["--max_new_tokens", 4, "--repeats", 2]
    report, records = _run(tmp_path / "out", "--random_weights", "tiny", *flags)
    assert _same_rows(report, records) == [(2, 1), (2, 4)]
    assert (report["kind"], report["preset"]) == ("random_weights", "tiny")
    assert "acceptance is not measured" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "bench.json", "bench.md", "steps.json", "steps.png",
    }  # fmt: skip


@pytest.mark.e2e
@pytest.mark.slow
def test_a_model_without_heads_gets_random_ones(saved, tmp_path, capsys):
    flags = ["--sizes", 3, "--batch_sizes", 1, 2, "--max_new_tokens", 2, "--repeats", 1]
    report, records = _run(tmp_path / "out", "steps", "--model", saved, "--heads_number", 1, *flags)
    assert _same_rows(report, records) == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert report["random_heads"] and report["heads"]["num_heads"] == 1
    assert "has no heads, so 1 random heads take their place" in capsys.readouterr().out


def test_ratios_are_taken_within_a_round(monkeypatch):
    """Plain steps of 1, 2 and 9 s beside a tree's 2, 4 and 3 s: ratios 2, 2 and 1/3, median 2.

    The ratio of the median times would be 3 s over 2 s. The first round, 50 s, compiles.
    """
    calls: list[tuple[int, int]] = []
    seconds = {1: iter([50.0, 1.0, 2.0, 9.0]), 4: iter([50.0, 2.0, 4.0, 3.0])}

    def step_seconds(decoder, params, batch, steps, programs):
        calls.append((batch, decoder.drafter.size))
        return next(seconds[decoder.drafter.size])

    monkeypatch.setattr(timing, "_step_seconds", step_seconds)
    monkeypatch.setattr(timing, "step_bytes", lambda decoder, params, cached: 6e8)
    rows = time_steps(
        TIED, HeadsConfig(2, 1, TIED.hidden_size, TIED.vocab_size), {},
        sizes=[4], batch_sizes=[2], steps=8, repeats=3, copy_bandwidth=1e9,
    )  # fmt: skip
    plain, tree = rows
    assert plain["step_overhead"] == {"median": 1, "min": 1, "max": 1}
    assert plain["step_ms"] == {"median": 2000, "min": 1000, "max": 9000}
    assert tree["step_ms"] == {"median": 3000, "min": 2000, "max": 4000}
    assert tree["bandwidth_share"]["median"] == pytest.approx(0.2)  # 0.6 GB in 3 s, of 1 GB/s
    assert tree["step_overhead"] == {"median": 2, "min": pytest.approx(1 / 3), "max": 2}
    assert steps.record(tree) == {"size": 4, "batch": 2, "seconds": 3, "over_plain": 2}
    assert calls == [(2, 1), (2, 4), (2, 4), (2, 1), (2, 1), (2, 4), (2, 4), (2, 1)]


def test_no_round_begins_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(timing, "_step_seconds", lambda *_: 1.0)
    monkeypatch.setattr(timing, "step_bytes", lambda *_: 6e8)
    heads = HeadsConfig(2, 1, TIED.hidden_size, TIED.vocab_size)
    how = {"sizes": [4], "batch_sizes": [2], "steps": 8, "repeats": 3, "copy_bandwidth": 1e9}
    for over, repeats in ((True, 1), (False, 3)):
        rows = time_steps(TIED, heads, {}, **how, over=lambda over=over: over)
        assert [row["repeats"] for row in rows] == [repeats] * 2


def test_the_shape_of_a_directory_without_weights(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    assert steps.shape_of(str(tmp_path)) == open_backbone(saved).config


def test_a_timing_ends_when_the_device_has_ended(monkeypatch):
    """Four steps keep the device busy for 8 s, long after the call has returned."""
    clock = types.SimpleNamespace(now=0.0)

    class Steps:
        def block_until_ready(self):
            clock.now += 8
            return self

        def __int__(self):
            return 4

    decoder: Any = types.SimpleNamespace(
        config=TIED,
        drafter=NoDraft(),
        prefill=lambda params, prompts, max_new_tokens: (),
    )
    programs = {(1, 1): lambda params, state, steps, least: ((), Steps())}
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    assert timing._step_seconds(decoder, {}, batch=1, steps=4, programs=programs) == 2


def test_no_row_ends_before_its_last_step():
    """Also where each step accepts all that it can, there is room for the steps of a timing."""
    assert room(PRESETS["llama2-7b"], depth=4, steps=32) == (251, 32)
    assert room(PRESETS["llama2-7b"], depth=4, steps=32, max_length=96) == (96, 16)
    assert room(TIED, depth=2, steps=32) == (64, 16)  # its context
    with pytest.raises(InputError, match="18 tokens are too few"):
        room(TIED, depth=2, steps=1, max_length=18)


def test_trees_are_cut_once_each():
    assert [tree.size for tree in trees([64, 4, 1, 4], num_heads=4)] == [1, 4, 64]
    # A single head of the published tree has ten guesses: 64 tokens are cut to eleven.
    assert [tree.size for tree in trees([8, 32, 64], num_heads=1)] == [1, 8, 11]
    assert [tree.size for tree in trees([1], num_heads=4)] == [1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sizes", 4, 0], "--sizes must be at least 1, got 0"),
        (["--model", "./none"], "./none does not exist"),
        (["--model", "110m", "--heads", "x"], "the weights of 110m are random"),
        (["--random_weights", "110m", "--heads", "x"], "the weights of 110m are random"),
        (["--random_weights", "110m", "--model", "110m"], "it goes with no --model"),
        (["--random_weights", "./none"], "--random_weights ./none: no shape of"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_input(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as done:
        main(["steps", *map(str, flags), "--output", str(tmp_path / "out")])
    assert done.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
