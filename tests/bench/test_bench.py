"""`python -m medusa_jax.bench prompts`: what is decoded, what is counted, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.head_files import VOCAB, WIDTH
from helpers.hydra import hydra_of_medusa
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_jax.bench import peers, summary
from medusa_jax.bench import prompts as program
from medusa_jax.bench.__main__ import main
from medusa_jax.bench.measure import Run, Task
from medusa_jax.bench.report import drafters_table
from medusa_jax.bench.summary import counters
from medusa_jax.data.prompts import read_requests
from medusa_jax.decoding.stats import Stats
from medusa_jax.drafting.medusa_heads import NO_HEADS
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    """No quarter of a gigabyte is copied to learn that the machine is a machine."""
    monkeypatch.setattr(program, "copy_bandwidth", lambda: summary.copy_bandwidth(4096))


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
    """The report of a run that succeeds."""
    arguments = [str(flag) for flag in flags]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    directory = Path(arguments[arguments.index("--output") + 1])
    return json.loads((directory / "bench.json").read_text())


def _refused(capsys, *flags: object) -> str:
    """What a run says that ends with exit code 2 and a single line."""
    with pytest.raises(SystemExit) as done:
        main([str(flag) for flag in flags])
    out = capsys.readouterr()
    assert done.value.code == 2 and not out.out
    (line,) = [line for line in out.err.splitlines() if "error: " in line]
    return line


@pytest.fixture(scope="module")
def made(model, prompts, tmp_path_factory) -> Path:
    """The output of a run that most tests look at."""
    directory = tmp_path_factory.mktemp("out") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "copy_bandwidth", lambda: summary.copy_bandwidth(4096))
        flags = ["--acceptance", "greedy,typical", "--max_prompts", 2, "--repeats", 2]
        flags += ["--raw", "--ignore_eos", "--max_new_tokens", 5, "--output", directory]
        stopped = _run("--model", model, *prompts, *flags, "--minutes", 0)
        kept = (directory / "runs.jsonl").read_text()
        report = _run("--model", model, *prompts, *flags)
    # The first prompt was decoded before, and the report has the times of then.
    assert (stopped["complete"], stopped["rows"][0]["texts"]) == (False, 1)
    assert report["complete"] and kept
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
    """Of one row to each other; `test_counters_of_an_example` has numbers by hand."""
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
def test_slots_are_refilled(model, prompts, report, tmp_path):
    """Two slots for five prompts of three categories: the same texts as prompt by prompt."""
    hydra = f"hydra:{hydra_of_medusa(model, tmp_path / 'hydra')}"
    refilled = _run("--model", model, *prompts, "--raw", "--batch_size", 2, "--ignore_eos",
                    "--max_prompts", 2, "--max_new_tokens", 5, "--repeats", 1,
                    "--drafters", f"medusa,ngram,{hydra}",
                    "--output", tmp_path / "out")  # fmt: skip
    assert "| tokens a step |" in (tmp_path / "out/bench.md").read_text()
    assert {row["system"] for row in refilled["rows"]} == {"plain", "medusa", "ngram", hydra}
    for name in ("ngram", hydra):
        assert _row(refilled, "greedy", "overall", name)["same_texts"] == {"same": 5, "of": 5}
    row, alone = (_row(r, "greedy", "overall", "medusa") for r in (refilled, report))
    assert row["same_texts"] == {"same": 5, "of": 5}
    for name in ("texts", "tokens", "num_drafts", "accepted_length_histogram"):
        assert row[name] == alone[name]


@pytest.mark.e2e
@pytest.mark.slow
def test_a_model_without_heads_is_decoded_plainly(model, prompts, tmp_path):
    headless = tmp_path / "headless"
    shutil.copytree(model, headless)
    (headless / "medusa_lm_head.safetensors").unlink()
    flags = ["--raw", "--ignore_eos", "--max_new_tokens", 3, "--repeats", 1, "--peers", "hf"]
    report = _run("--model", headless, *prompts[2:], *flags, "--output", tmp_path / "out")
    assert [row["system"] for row in report["rows"]] == ["plain", "hf"] * 2
    assert _row(report, "greedy", "overall", "hf")["same_texts"] == {"same": 2, "of": 2}


def test_a_category_is_read(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "category": "qa"}\n{"prompt": "b"}\n')
    assert [request.category for request in read_requests(file)] == ["qa", ""]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--acceptance", "greedy,best"], "unknown acceptance 'best'"),
        (["--repeats", 0], "--repeats must be at least 1, got 0"),
        (["--max_prompts", -1], "--max_prompts must be at least 0, got -1"),
        (["--batch_size", 0], "--batch_size must be at least 1, got 0"),
        (["--peers", "none", "hf"], "--peers none goes with no other"),
        (["--peers", "vllm"], "invalid choice: 'vllm'"),
        (["--batch_size", 2, "--peers", "hf"], "at batch size 1 only"),
        (["--drafters", "medusa,best"], "no drafter 'best'; known: "),
        (["--drafters", "medusa,medusa"], "each is measured once"),
        (["--drafters", "medusa", "--drafter", "medusa"], "--drafter goes with no --drafters"),
        (["--minutes", -1], "--minutes must be at least 0, got -1"),
        (["--histogram", "y"], "unrecognized arguments: --histogram y"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, capsys, flags, message):
    assert message in _refused(capsys, "prompts", *flags, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_output(tmp_path, capsys):
    error = _refused(capsys, "--output", tmp_path / "no/out")
    assert "its directory does not exist" in error
    (tmp_path / "file").touch()
    assert "expected a directory, not a file" in _refused(capsys, "--output", tmp_path / "file")
    assert "required: --output" in _refused(capsys, "--repeats", 1)


def test_peers_without_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "available", lambda: False)
    error = _refused(capsys, "--peers", "hf", "--output", tmp_path / "out")
    assert "torch is missing" in error
    monkeypatch.setattr(peers, "available", lambda: False)
    with pytest.raises(InputError, match="need torch"):
        peers.HuggingFace(tmp_path, "float32", (), ())


def test_nothing_fits(model, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "w1 " * 80}))
    flags = ["--model", model, "--prompts", tmp_path / "long.jsonl", "--peers", "none"]
    error = _refused(capsys, *flags, "--output", tmp_path / "out")
    assert "none of the prompts can be decoded" in error


def test_drafters_beside_each_other():
    """Of 10 steps each; the second takes 5 ms more than plain steps and accepts 2 tokens."""
    cost = {"plain": (0.1, [1] * 10), "medusa": (0.15, [2] * 10), "ngram": (0.12, [1, 2] * 5)}
    task = Task("greedy", "qa", [[1]], [(0, 0)])
    runs = []
    for name, (seconds, lengths) in cost.items():
        stats = Stats(tokens=sum(lengths), passes=10, seconds=seconds, decode_seconds=seconds)
        runs.append(Run(0, name, 0, [[0] * sum(lengths)], lengths, stats))
    drafter = drafter_of_heads(NO_HEADS, Tree(((0,), (0, 0))))
    drafters = {"greedy": {"medusa": drafter, "ngram": drafter}}
    rows = summary.summarise([task], runs, drafters, bandwidth=1e9)
    cells = [line.split(" | ") for line in drafters_table(rows).splitlines()[2:]]
    assert [line[1] for line in cells] == ["plain", "Medusa", "ngram"]
    assert [line[3] for line in cells] == ["1.00", "2.00", "1.50"]
    assert [line[5].split()[0] for line in cells] == ["0.00", "5.00", "2.00"]
    assert [line[7].split()[0] for line in cells] == ["1.00x", "1.33x", "1.25x"]
