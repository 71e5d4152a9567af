"""`decode.py` as a user runs it: what it prints, what it writes, and how it says no."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.paths import SCRIPT

from medusa_jax.data.tokenizer import ChatTokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture
def models(shared) -> Path:
    return shared / "models"


@pytest.fixture
def stories_flags(models) -> list[object]:
    return ["--model", models / "stories260K", "--heads", models / "stories260K-medusa"]


def _records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_story_is_printed_and_recorded(run, stories_flags, golden, tmp_path):
    """The issue's own command, against the recorded run of the original."""
    record = next(r for r in golden if (r.get("tree"), r["mode"]) == ("mc_sim_7b_63", "greedy"))
    out_file = tmp_path / "out.jsonl"
    flags = ["--prompt", record["prompt"], "--raw", "--acceptance", "greedy"]
    flags += ["--tree", "mc_sim_7b_63", "--max_new_tokens", 64, "--output", out_file]
    code, out, err = run(*stories_flags, *flags)
    assert code == 0
    (written,) = _records(out_file)
    assert written["token_ids"] == record["output_ids"][:64]
    assert written["prompt"] == record["prompt"]
    assert written["prompt_ids"] == record["prompt_ids"]
    steps = len(written["tokens_per_step"])
    assert written["tokens_per_step"] == record["tokens_per_step"][:steps]
    mean = written["mean_accepted_length"]
    assert mean == sum(written["tokens_per_step"]) / steps
    assert written["finish_reason"] == "length"
    assert written["seconds"] > 0
    assert out == written["text"] + "\n"
    assert f"64 tokens in {written['seconds']:.2f} s" in err
    assert f"mean accepted length {mean:.2f}, {steps} steps" in err


def test_samples_of_a_file_in_batches(run, models, stories_flags, tmp_path):
    """Each form of record; a sample does not depend on the batch it was decoded in."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "Once upon a time", "id": "a"}\n'
        '{"turns": ["Tom", "Then"], "question_id": 7}\n'
        '{"prompt_ids": [1, 403, 407, 261, 378]}\n'
    )
    flags = [*stories_flags, "--prompts", prompts, "--raw", "--acceptance", "lossless"]
    flags += ["--temperature", 0.8, "--num_samples", 2, "--max_new_tokens", 20, "--ignore_eos"]
    files = {}
    for size in (1, 4):
        files[size] = tmp_path / f"{size}.jsonl"
        code, out, _ = run(*flags, "--batch_size", size, "--output", files[size])
        assert (code, out) == (0, "")
    order = lambda record: (record["input"], record["sample"], record["turn"])  # noqa: E731
    one, four = _records(files[1]), sorted(_records(files[4]), key=order)  # as rows ended
    key = ["id", "turn", "sample"]
    assert [[r.get(k) for k in key] for r in one] == [
        ["a", 0, 0],
        ["a", 0, 1],
        [7, 0, 0],
        [7, 1, 0],
        [7, 0, 1],
        [7, 1, 1],
        [None, 0, 0],
        [None, 0, 1],
    ]
    assert [r["token_ids"] for r in one] == [r["token_ids"] for r in four]
    assert one[0]["token_ids"] != one[1]["token_ids"]
    assert one[6]["prompt_ids"] == one[0]["prompt_ids"]
    first, second = one[2], one[3]
    text = ChatTokenizer(models / "stories260K", raw=True)
    conversation = ["Tom", first["text"].strip(), "Then"]
    assert second["prompt"] == "Then"
    assert second["prompt_ids"] == text.encode([{"content": turn} for turn in conversation])


@pytest.mark.parametrize("size", [1, 2])
def test_a_conversation_that_outgrows_the_context_keeps_its_answers(
    run, stories_flags, tmp_path, size
):
    """Streamed or in a batch: the turn that does not fit is left out, with a warning."""
    prompts, out_file = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"turns": ["Tom", "word " * 400]}) + '\n{"prompt": "Ben"}\n')
    flags = [*stories_flags, "--prompts", prompts, "--raw", "--max_new_tokens", 8]
    code, _, _ = run(*flags, "--batch_size", size)
    assert code == 0
    code, _, _ = run(*flags, "--batch_size", size, "--output", out_file)
    assert code == 0
    assert [record["prompt"] for record in _records(out_file)] == ["Tom", "Ben"]


def test_compare_prints_the_ratio(run, stories_flags):
    code, _, err = run(
        *stories_flags, "--prompt", "Tom", "--prompt", "Lily", "--compare", "--max_new_tokens", 20
    )
    assert code == 0
    assert "ratio " in err and "2 of 2 texts are the same" in err
    assert err.count("tokens/s") == 2


def test_plain_decoding_needs_no_heads(run, models):
    flags = ["--model", models / "poem", "--prompt", "主题：明月 体裁：五绝\n"]
    code, _, err = run(*flags)
    assert code == 2 and "no Medusa heads" in err and "--autoregressive" in err
    code, out, err = run(*flags, "--autoregressive", "--suppress_tokens", 0)
    assert code == 0 and "mean accepted length 1.00" in err
    assert 20 <= len(out.strip()) <= 60  # four lines of five characters, ended by </s>


def test_a_merged_checkpoint_brings_its_heads(run, models):
    flags = ["--prompt", "Once upon a time", "--max_new_tokens", 20]
    code, out, _ = run("--model", models / "stories260K-medusa-1.0", *flags)
    assert code == 0
    assert out == run("--model", models / "stories260K-medusa", *flags)[1]


def test_typical_with_a_sampled_root(run, stories_flags):
    flags = ["--prompt", "Tom", "--acceptance", "typical", "--sample_root", "--max_new_tokens", 30]
    texts = {run(*stories_flags, *flags, "--seed", seed)[1] for seed in (1, 1, 2)}
    assert len(texts) == 2


def test_chat_keeps_the_conversation(run, stories_flags):
    flags = [*stories_flags, "--chat", "--chat_template", "zephyr", "--max_new_tokens", 12]
    code, out, err = run(*flags, stdin="Hi\n\nAnd then?\n/reset\nHi\n")
    answers = out.splitlines()
    assert code == 0 and err.count("> ") == 6
    assert answers[0] == answers[-1]  # greedy, after a reset
    code, _, err = run(*flags, stdin="word " * 400 + "\nHi\n")
    assert code == 0 and "exceed the model's context" in err and "/reset" in err
    code, _, err = run(*stories_flags, "--chat")
    assert code == 2 and "no chat template" in err


def test_prompts_of_a_pipe_and_bytes_that_are_no_text(run, stories_flags, tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b'{"prompt": "Tom"}\n{"prompt": "a\\ud83d", "id": "\\ud800"}\n')
    os.close(writer)
    out_file = tmp_path / "out.jsonl"
    flags = [*stories_flags, "--max_new_tokens", 4, "--output", out_file]
    code, _, _ = run(*flags, "--prompts", f"/dev/fd/{reader}")
    os.close(reader)
    assert code == 0
    assert [(r["prompt"], r.get("id")) for r in _records(out_file)] == [
        ("Tom", None),
        ("a\ufffd", "\ufffd"),
    ]
    code, _, _ = run(*flags, "--prompt", "caf\udce9")  # as Python reads the byte E9
    assert code == 0 and [record["prompt"] for record in _records(out_file)] == ["caf\ufffd"]


def test_an_earlier_output_stays_until_the_new_one_is_whole(run, stories_flags, tmp_path):
    prompts, out_file = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "Tom"}\n{"prompt": "Lily"}\nno JSON\n')
    out_file.write_text("earlier\n")
    flags = [*stories_flags, "--prompts", prompts, "--output", out_file, "--max_new_tokens", 4]
    code, _, err = run(*flags)
    partial = tmp_path / "out.jsonl.partial"
    assert code == 2 and f"2 records were written to {partial}" in err
    assert out_file.read_text() == "earlier\n"
    assert [record["prompt"] for record in _records(partial)] == ["Tom", "Lily"]
    prompts.write_text('{"prompt": "Ben"}\n')
    assert run(*flags)[0] == 0
    assert [record["prompt"] for record in _records(out_file)] == ["Ben"]
    assert not partial.exists()


# --- bad input --------------------------------------------------------------------------------


def test_a_malformed_line_keeps_what_came_before(run, stories_flags, tmp_path):
    prompts, out_file = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "Tom"}\n{"prompt": "Lily"}\n{"prompt": \n{"prompt": "Ben"}\n')
    flags = [*stories_flags, "--prompts", prompts, "--output", out_file, "--max_new_tokens", 8]
    code, _, err = run(*flags, "--batch_size", 4)
    assert code == 2
    assert f"{prompts}, line 3: not JSON" in err
    assert {record["prompt"] for record in _records(out_file)} == {"Tom", "Lily"}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5] * 500, " has 500 tokens and 20 new ones were asked for: 520 exceed"),
        ([5, 512], ": token ids must lie in 0..511"),
    ],
)
def test_a_prompt_that_does_not_fit_keeps_what_came_before(
    run, stories_flags, tmp_path, ids, message
):
    prompts, out_file = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "Tom"}\n' + json.dumps({"prompt_ids": ids}) + "\n")
    flags = [*stories_flags, "--prompts", prompts, "--output", out_file, "--max_new_tokens", 20]
    code, _, err = run(*flags, "--batch_size", 2)
    assert code == 2
    assert f"{prompts}, line 2{message}" in err
    assert len(_records(out_file)) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "no/such/dir", "--prompt", "a"], "no/such/dir does not exist"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--acceptance", "nucleus"], "unknown acceptance 'nucleus'"),
        (["--prompt", "a", "--tree", "mc_sim"], "--tree mc_sim: neither auto"),
        (["--prompt", "a", "--tree", "grow:8:9"], "9 deep was asked for, but there are"),
        (["--prompt", "a", "--acceptance", "lossless", "--temperature", "0"], "temperature"),
        (["--prompt", "a", "--max_new_tokens", "600"], "exceed the model's context of 512"),
        (["--prompt", "a", "--max_length", "513"], "max_length 513 must lie in 2..512"),
        (["--prompt", "a", "--max_new_tokens", "0"], "at least 1, got 0"),
        (["--prompt", "a", "--num_samples", "0"], "--num_samples must be at least 1"),
        (["--prompts", "none.jsonl"], "none.jsonl does not exist"),
        (["--prompts", ""], "expected a file, not a directory"),
        (["--prompts", "/dev"], "expected a file, not a directory"),
        (["--prompt", "a", "--output", "no/dir/out.jsonl"], "its directory does not exist"),
        (["--prompt", "a", "--suppress_tokens", "512"], "suppress"),
        (["--prompt", "a", "--top_k", "many"], "invalid int value"),
        (["--prompt", "a", "--sampling"], "unrecognized arguments: --sampling"),
        ([], "one of the arguments --prompt --prompts --chat is required"),
    ],
)
def test_wrong_flags_exit_with_2_and_one_message(run, stories_flags, flags, message):
    code, out, err = run(*stories_flags, *flags)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("form", ["same", "symlink", "hardlink"])
def test_the_prompts_are_not_the_output(run, tmp_path, form):
    """Found before a model is loaded: there is none here."""
    prompts = output = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    if form != "same":
        output = tmp_path / "link.jsonl"
        getattr(output, f"{form}_to")(prompts)
    code, _, err = run("--model", "none", "--prompts", prompts, "--output", output)
    assert code == 2 and "which is read: give another file" in err
    assert prompts.read_text() == '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("[[0], [0, 1, 0]]", "[0, 1, 0] has no parent: [0, 1] is not listed"),
        ("[[0], [0,0], [0,0,0], [0,0,0,0], [0,0,0,0,0], [0,0,0,0,0,0]]", "6 deep, but there are 5"),
        ("[[600]]", "rank 600 of a vocabulary of 512"),
        ('{"a": 1', "tree.json"),
    ],
)
def test_bad_trees(run, stories_flags, tmp_path, tree, message):
    file = tmp_path / "tree.json"
    file.write_text(tree)
    code, _, err = run(*stories_flags, "--prompt", "a", "--tree", file)
    assert code == 2 and message in err


def test_heads_of_another_model(run, models):
    code, _, err = run(
        "--model", models / "poem", "--heads", models / "stories260K-medusa", "--prompt", "a"
    )
    assert code == 2 and "made for hidden size 64, the model has 96" in err


@pytest.mark.parametrize(("number", "size"), [(signal.SIGINT, 4), (signal.SIGTERM, 1)])
def test_an_interrupted_run_ends_at_once_and_keeps_whole_lines(
    stories_flags, tmp_path, number, size
):
    """In the middle of a file: each line written so far is a record, and one message says why."""
    prompts, out_file = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "Once upon a time"}\n' * 20000)
    flags = [*stories_flags, "--prompts", prompts, "--output", out_file, "--max_new_tokens", 40]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, flags), "--batch_size", str(size)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if out_file.is_file() and out_file.stat().st_size > 4000:
            break
        time.sleep(0.05)
    process.send_signal(number)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 2
    assert process.returncode == 130
    assert err.count("error: interrupted") == 1 and "Traceback" not in err
    assert len(_records(out_file)) >= 2
