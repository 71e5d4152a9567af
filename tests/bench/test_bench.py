"""`python -m medusa_jax.bench`: its figures add up, and it says no before it takes long."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.head_files import VOCAB, WIDTH
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_jax.bench import __main__ as bench
from medusa_jax.bench import peers, summary
from medusa_jax.bench.summary import counters, histogram
from medusa_jax.data.prompts import read_requests
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig

TINY = ModelConfig(48, 16, 32, 1, 2, 2, 8, 64, tied=True)


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    """No quarter of a gigabyte is copied to learn that the machine is a machine."""
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: summary.copy_bandwidth(4096))


@pytest.fixture(scope="module")
def model(saved, tmp_path_factory) -> Path:
    """The random Llama with a tokenizer of as many words, and two random heads."""
    directory = tmp_path_factory.mktemp("bench") / "model"
    shutil.copytree(saved, directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    random = np.random.default_rng(0)
    shapes = {
        "0.linear.weight": (WIDTH, WIDTH),
        "0.linear.bias": (WIDTH,),
        "1.weight": (VOCAB, WIDTH),
    }
    heads = {
        f"{i}.{name}": random.normal(size=shape).astype(np.float32)
        for i in range(2)
        for name, shape in shapes.items()
    }
    save_file(heads, directory / "medusa_lm_head.safetensors")
    return directory


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list[object]:
    """Flags of two files: one with categories and two turns, one of plain prompts."""
    directory = tmp_path_factory.mktemp("prompts")
    (directory / "bench.jsonl").write_text(
        '{"question_id": 81, "category": "maths", "turns": ["w3 w4", "w5"]}\n'
        '{"question_id": 82, "category": "qa", "turns": ["w6"]}\n'
        '{"question_id": 83, "category": "qa", "turns": ["w7"]}\n'
    )
    (directory / "short.jsonl").write_text('{"prompt": "w8 w9"}\n{"prompt": "w10"}\n')
    return [
        flag for name in ("bench", "short") for flag in ("--prompts", directory / f"{name}.jsonl")
    ]


def _run(*flags: object) -> dict[str, Any]:
    parsed = bench.parse([str(flag) for flag in flags])
    bench.main(parsed)
    return json.loads((Path(parsed.output) / "bench.json").read_text())


@pytest.fixture(scope="module")
def made(model, prompts, tmp_path_factory) -> Path:
    """The output of a run that most tests look at."""
    directory = tmp_path_factory.mktemp("out") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "copy_bandwidth", lambda: summary.copy_bandwidth(4096))
        flags = ["--acceptance", "greedy,typical", "--max_prompts", 2, "--repeats", 2]
        flags += ["--raw", "--ignore_eos", "--max_new_tokens", 5, "--output", directory]
        _run("--model", model, *prompts, *flags)
    return directory


@pytest.fixture(scope="module")
def report(made) -> dict[str, Any]:
    return json.loads((made / "bench.json").read_text())


def _row(report: dict[str, Any], *names: str) -> dict[str, Any]:
    keys = ("acceptance", "category", "system")
    (found,) = [row for row in report["rows"] if tuple(row[key] for key in keys) == names]
    return found


@pytest.mark.e2e
@pytest.mark.slow
def test_every_system_has_its_rows(report):
    systems = {"greedy": ["plain", "medusa", "hf", "hf_lookup"], "typical": ["plain", "medusa"]}
    assert [(row["acceptance"], row["category"], row["system"]) for row in report["rows"]] == [
        (acceptance, category, system)
        for acceptance in systems
        for category in ("maths", "qa", "short", "overall")
        for system in systems[acceptance]
    ]


@pytest.mark.e2e
@pytest.mark.slow
def test_texts_are_the_same_and_counted(report):
    """Two turns of the first prompt: a conversation goes on with its own answers."""
    for system in ("medusa", "hf", "hf_lookup"):
        assert _row(report, "greedy", "overall", system)["same_texts"] == {"same": 5, "of": 5}
    counts = {"maths": 2, "qa": 1, "short": 2, "overall": 5}
    for row in report["rows"]:
        assert row["texts"] == counts[row["category"]]
        assert row["tokens"] == 5 * row["texts"]


@pytest.mark.e2e
@pytest.mark.slow
def test_figures_add_up(report):
    for row in (row for row in report["rows"] if row["system"] == "medusa"):
        drafts, counts = row["num_drafts"], row["accepted_length_histogram"]
        made = sum(length * count for length, count in enumerate(counts, start=1))
        assert sum(counts) == drafts
        assert row["num_accepted_tokens"] == made - drafts
        assert row["num_accepted_tokens"] == sum(row["num_accepted_tokens_per_pos"])
        assert row["mean_accepted_length"] == made / drafts
        assert row["num_draft_tokens"] == drafts * (row["tree_size"] - 1)
        assert made >= row["tokens"]  # a last step may make more than is kept
    for row in report["rows"]:
        for value in (
            value for value in row.values() if isinstance(value, dict) and "min" in value
        ):
            assert 0 < value["min"] <= value["median"] <= value["max"]
    plain = _row(report, "greedy", "overall", "plain")
    assert plain["speedup"] == plain["step_overhead"] == {"median": 1, "min": 1, "max": 1}
    assert plain["num_drafts"] == plain["tokens"]


@pytest.mark.e2e
@pytest.mark.slow
def test_the_report_is_written(made, report):
    text = (made / "bench.md").read_text()
    assert "| maths | HF prompt lookup |" in text
    assert "Medusa 5 of 5" in text
    assert {file.name for file in made.iterdir()} == {
        "bench.json", "bench.md", "speed.png", "acceptance.png",
    }  # fmt: skip
    assert (made / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert report["jax"] and report["cpu_count"] and report["torch_threads"]


def test_counters_of_an_example():
    assert counters([1, 3, 1, 2], tree_size=4, depth=2) == {
        "mean_accepted_length": 7 / 4,
        "num_drafts": 4,
        "num_draft_tokens": 12,
        "num_accepted_tokens": 3,
        "num_accepted_tokens_per_pos": [2, 1],
        "accepted_length_histogram": [2, 1, 1],
    }


@pytest.mark.e2e
@pytest.mark.slow
def test_batches_without_peers(model, prompts, tmp_path):
    """A short last batch is padded; what pads it counts for nothing."""
    report = _run("--model", model, *prompts, "--raw", "--batch_size", 2, "--ignore_eos",
                  "--max_new_tokens", 5, "--repeats", 1, "--output", tmp_path / "out")  # fmt: skip
    assert {row["system"] for row in report["rows"]} == {"plain", "medusa"}
    row = _row(report, "greedy", "overall", "medusa")
    assert row["same_texts"] == {"same": 6, "of": 6}
    assert row["tokens"] == 30


@pytest.mark.e2e
@pytest.mark.slow
def test_random_weights(monkeypatch, tmp_path, capsys):
    """Steps of tied weights and shared heads, with the lengths that another run accepted."""
    monkeypatch.setitem(bench.PRESETS, "tiny", TINY)
    (tmp_path / "lengths.json").write_text("[1, 2, 1]")
    flags = [
        "--random_weights",
        "tiny",
        "--shared_heads",
        "--sizes",
        4,
        1,
        4,
        "--batch_sizes",
        2,
    ]
    flags += ["--max_new_tokens", 4, "--repeats", 2, "--heads_number", 2]
    report = _run(*flags, "--histogram", tmp_path / "lengths.json", "--output", tmp_path / "out")
    shapes = [(row["batch_size"], row["nodes"]) for row in report["rows"]]
    assert shapes == [(2, 1), (2, 4)]
    assert report["mean_accepted_length"] == 2
    for row in report["rows"]:
        length = 1 if row["nodes"] == 1 else 2
        assert row["speedup"] == length / row["step_overhead"]["median"]
    out = capsys.readouterr().out
    assert "acceptance is not measured" in out and "lengths.json" in out
    assert (tmp_path / "out/steps.png").is_file()


@pytest.mark.e2e
@pytest.mark.slow
def test_a_report_is_a_histogram(made, report):
    mean, origin = histogram(made / "bench.json")
    assert mean == _row(report, "greedy", "overall", "medusa")["mean_accepted_length"]
    assert "bench.json (greedy acceptance, tree of" in origin


@pytest.mark.parametrize("content", ["{}", "[]", "[0]", "[1, -1]", '"x"', "nonsense"])
def test_no_histogram(tmp_path, content):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(InputError, match=r"--histogram .*file\.json"):
        histogram(tmp_path / "file.json")


def test_a_category_is_read(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "category": "qa"}\n{"prompt": "b"}\n')
    assert [request.category for request in read_requests(file)] == ["qa", ""]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--prompts", "x", "--acceptance", "greedy,best"], "unknown acceptance 'best'"),
        (["--prompts", "x", "--repeats", 0], "--repeats must be at least 1, got 0"),
        (["--prompts", "x", "--max_prompts", -1], "--max_prompts must not be negative"),
        (["--prompts", "x", "--peers", "none", "hf"], "--peers none goes with no other"),
        (["--prompts", "x", "--histogram", "y"], "--histogram goes with --random_weights"),
        (["--random_weights", "110m", "--sizes", 4, 0], "--sizes must be at least 1, got 0"),
        (["--random_weights", "110m", "--histogram", "no.json"], "no.json"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        _run(*flags, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_output(tmp_path):
    with pytest.raises(InputError, match="its directory does not exist"):
        _run("--random_weights", "110m", "--output", tmp_path / "no/out")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is no directory"):
        _run("--random_weights", "110m", "--output", tmp_path / "file")


def test_peers_that_cannot_be(prompts, tmp_path, monkeypatch):
    flags = [*prompts, "--peers", "hf", "--output", tmp_path / "out"]
    with pytest.raises(InputError, match="at batch size 1 only"):
        _run(*flags, "--batch_size", 2)
    monkeypatch.setattr(bench, "available", lambda: False)
    with pytest.raises(InputError, match="torch is missing"):
        _run(*flags)
    monkeypatch.setattr(peers, "available", lambda: False)
    with pytest.raises(InputError, match="need torch"):
        peers.HuggingFace(tmp_path, "float32", (), ())


def test_nothing_fits(model, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "w1 " * 80}))
    flags = ["--model", model, "--prompts", tmp_path / "long.jsonl", "--peers", "none"]
    with pytest.raises(InputError, match="none of the prompts can be decoded"):
        _run(*flags, "--output", tmp_path / "out")
