"""`python -m medusa_jax.distill` as a user runs it: what it writes, resumes and refuses."""

import functools
import json
import shutil
from pathlib import Path

import pytest

from medusa_jax.data.corpus import Corpus
from medusa_jax.data.encoding import encode
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.errors import InputError
from medusa_jax.files import locked
from medusa_jax.serving.continued_output import resume, settings
from medusa_jax.serving.distill_options import DistillOptions
from medusa_jax.serving.generator import Generator

FULL_STOP = 426  # the token "." of stories260K


@pytest.fixture
def run(run_module):
    return functools.partial(run_module, "distill")


@pytest.fixture
def model(shared) -> list[object]:
    """Flags of most tests, so that few shapes are compiled."""
    flags = ["--max_length", 128, "--batch_size", 4, "--stop_id", FULL_STOP]
    return ["--model", shared / "models/stories260K", *flags]


def generator(shared: Path, **options: object) -> Generator:
    """Plain decoding of single rows with the limits of `model`."""
    ends = {"max_length": 128, "stop_id": [FULL_STOP], "autoregressive": True}
    return Generator.load(shared / "models/stories260K", **ends, **options)


@pytest.fixture
def tales(tmp_path) -> Path:
    """Seven plain texts; the fifth has a prompt that does not fit 128 tokens."""
    names = ["Tom", "Lily", "Ben", "Anna", "Sam", "Mia", "Tim"]
    texts = [f"One day  {name} went out to play and then home again." for name in names]
    texts[4] = "Pneumonoultramicroscopic" * 20
    file = tmp_path / "tales.txt"
    file.write_text("<|endoftext|>".join(texts))
    return file


@pytest.fixture
def chats(tmp_path) -> Path:
    """Three turns after a system message; one turn that does not fit; one without a name."""
    turns = [["Hi, who are you?", "And then?", "Why?"], ["Tom", "word " * 400], ["Lily ran"]]
    records = [
        {"id": f"c{i}", "conversations": [said for text in texts for said in _said(text)]}
        for i, texts in enumerate(turns)
    ]
    records[0]["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    del records[2]["id"]
    file = tmp_path / "chats.json"
    file.write_text(json.dumps(records))
    return file


@pytest.fixture
def template(tmp_path) -> Path:
    file = tmp_path / "marked.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}Lily and")
    return file


def _said(text: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": "(the data's own answer)"}]


def _records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _values(record: dict) -> list[str]:
    return [said["value"] for said in record["conversations"]]


@pytest.mark.e2e
@pytest.mark.slow
def test_stories_go_on_from_their_first_words(run, model, stories, shared, tales, tmp_path):
    """Prompts as they stand in the text, answers as greedy decoding continues them."""
    output = tmp_path / "out.jsonl"
    flags = [*model, "--data", tales, "--words", 4, "--temperature", 0]
    flags += ["--heads", shared / "models/stories260K-medusa", "--tree", "mc_sim_7b_63"]
    code, err = run(*flags, "--output", output)
    assert code == 0
    assert f"6 records added to {output}; skipped: 1 (the first: {tales}, record 5" in err
    written = _records(output)
    assert [one["input"] for one in written] == [0, 1, 2, 3, 5, 6]
    assert written[1]["id"] == "tales.txt-1"
    plain = generator(shared)
    for one in written:
        prompt, story = _values(one)
        assert prompt.startswith("One day  ") and prompt.endswith(" went")
        (expected,) = plain.generate([prompt])
        assert story == expected.text and story.startswith(" ")
        assert one["truncated"] == (expected.finish_reason == "length")


@pytest.mark.e2e
@pytest.mark.slow
def test_a_conversation_hears_the_models_own_answers(run, model, shared, chats, template, tmp_path):
    """Turn after turn, as `Answerer.answer` holds it; what does not fit ends it early."""
    output = tmp_path / "out.jsonl"
    flags = ["--data", chats, "--chat_template", template]
    code, err = run(*model, *flags, "--seed", 3, "--output", output)
    assert code == 0 and "ended before their last turn: 1 (the first: " in err
    first, second, third = _records(output)
    assert [one["id"] for one in (first, second, third)] == ["c0", "c1", "chats.json-2"]
    speakers = [said["from"] for said in first["conversations"]]
    assert speakers == ["system", *["human", "gpt"] * 3] and not first["truncated"]
    assert len(_values(second)) == 2 and not second["truncated"]

    # The same conversation in single rows: a row's draws depend on its stream and position alone.
    single = generator(
        shared, chat_template=str(template), acceptance="lossless", temperature=0.3, seed=3
    )
    messages = [{"role": "system", "content": "Be brief."}]
    for asked, answered in zip(_values(first)[1::2], _values(first)[2::2], strict=True):
        messages.append({"role": "user", "content": asked})
        (answer,) = single.generate([messages])
        assert answered == answer.text.strip()
        messages.append({"role": "assistant", "content": answered})
    assert _values(third)[0] == "Lily ran" and _values(third)[1]

    # Training reads the tokens of the answers, not what their text would be tokenized to.
    text = ChatTokenizer(shared / "models/stories260K", template=str(template))
    # The template cannot write the long talk for training. Tokens need no template.
    encoded = list(encode(Corpus([str(output)]), text))
    assert "token_ids" not in first  # a later prompt strips an earlier answer
    for record, document in zip((second, third), encoded, strict=True):
        assert document.ids.tolist() == record["token_ids"]
        ((start, stop),) = record["learnt"]
        assert document.learnt.tolist() == [start <= i < stop for i in range(len(document.ids))]
        answer = text.decode(document.ids[:start], document.ids[start:stop])
        assert answer.strip() == _values(record)[1]
    other = ChatTokenizer(shared / "models/stories260K", template="zephyr")
    assert [*encode(Corpus([str(output)]), other)][2].ids.tolist() != third["token_ids"]


@pytest.mark.e2e
@pytest.mark.slow
def test_an_answer_cut_off_ends_its_conversation(run, model, chats, template, tmp_path):
    output = tmp_path / "out.jsonl"
    flags = ["--data", chats, "--chat_template", template, "--max_new_tokens", 3]
    assert run(*model, *flags, "--output", output)[0] == 0
    written = _records(output)
    assert [one["truncated"] for one in written] == [True] * 3
    assert [len(_values(one)) for one in written] == [3, 2, 2]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 150, -20, None])
def test_an_interrupted_run_goes_on_byte_for_byte(run, model, tales, tmp_path, kept):
    """Cut inside a line, inside the last line, or not at all; other batches after it."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    flags = [*model, "--data", tales, "--words", "2-6"]
    assert run(*flags, "--output", whole)[0] == 0
    assert len({len(_values(one)[0].split()) for one in _records(whole)}) > 1
    shutil.copy(f"{whole}.settings.json", f"{cut}.settings.json")
    cut.write_bytes(whole.read_bytes()[:kept])
    lines = cut.read_bytes().count(b"\n")
    code, err = run(*flags, "--output", cut, "--batch_size", 2)
    assert code == 0 and f"{6 - lines} records added" in err
    assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.e2e
@pytest.mark.slow
def test_shards_share_the_inputs_out(run, model, tales, tmp_path):
    whole, *parts = (tmp_path / f"{i}.jsonl" for i in range(3))
    flags = [*model, "--data", tales, "--words", 3]
    assert run(*flags, "--output", whole)[0] == 0
    for i, part in enumerate(parts):
        assert run(*flags, "--output", part, "--shard", f"{i}/2", "--batch_size", 2)[0] == 0
    together = [one for part in parts for one in _records(part)]
    assert sorted(together, key=lambda one: one["input"]) == _records(whole)
    assert [one["input"] for one in _records(parts[1])] == [1, 3, 5]


@pytest.mark.e2e
@pytest.mark.slow
def test_prompt_records_and_repeated_ones(run, model, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(
        '{"turns": ["Tom", "Then"], "question_id": 7}\n{"prompt": "Ben"}\nno JSON\n'
        '{"prompt_ids": [1, 403]}\n{"prompt": "Ben"}\n{"prompt": "Mia"}\n'
    )
    flags = [*model, "--data", prompts, "--output", output, "--unique"]
    code, err = run(*flags, "--chat_template", "zephyr")
    assert code == 0 and "skipped: 2 (the first: " in err and "line 3: not JSON" in err
    written = [(one["id"], one["input"], _values(one)[0]) for one in _records(output)]
    assert written == [
        ("7", 0, "Tom"),
        ("prompts.jsonl-1", 1, "Ben"),
        ("prompts.jsonl-4", 4, "Mia"),
    ]


@pytest.mark.e2e
@pytest.mark.slow
def test_a_refused_input_keeps_what_came_before(run, model, tales, tmp_path):
    output = tmp_path / "out.jsonl"
    flags = [*model, "--data", tales, "--words", 3, "--output", output]
    code, err = run(*flags, "--on_bad", "refuse")
    assert code == 2 and f"error: {tales}, record 5 has " in err
    assert [one["input"] for one in _records(output)] == [0, 1, 2, 3]
    assert run(*flags)[0] == 0  # skipping it instead is no other setting
    assert [one["input"] for one in _records(output)] == [0, 1, 2, 3, 5, 6]


@pytest.mark.e2e
@pytest.mark.slow
def test_other_settings_do_not_continue_an_output(run, model, tales, tmp_path):
    output = tmp_path / "out.jsonl"
    flags = [*model, "--data", tales, "--words", 3, "--output", output]
    assert run(*flags, "--max_documents", 2)[0] == 0
    before = output.read_bytes()
    code, err = run(*flags, "--max_documents", 2, "--seed", 1, "--temperature", 0.5)
    assert code == 2
    assert "made with other settings: --seed was 0, is 1; --temperature was 0.3, is 0.5" in err
    (tmp_path / "out.jsonl.settings.json").unlink()
    code, err = run(*flags, "--max_documents", 2)
    assert code == 2 and "out.jsonl.settings.json does not exist: not continued" in err
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    "beside", ["{", "[" * 100_000, "[1]", '{"seed": "a", "contents": 5}', None]
)
def test_an_output_is_continued_only_with_its_own_settings(run, tales, tmp_path, beside):
    """Found before a model is loaded. With no settings at all, something else made the output."""
    output = tmp_path / "out.jsonl"
    output.write_text("half a li")
    if beside:
        (tmp_path / "out.jsonl.settings.json").write_text(beside)
    code, err = run("--model", "none", "--data", tales, "--words", 3, "--output", output)
    assert code == 2 and err.count("error:") == 1 and "out.jsonl" in err
    assert output.read_text() == "half a li"


def test_other_data_of_the_same_name_does_not_continue_an_output(tales, tmp_path):
    output = tmp_path / "out.jsonl"
    options = DistillOptions(data=[str(tales)], output=str(output), words="3")
    assert resume(output, settings(options)) == 0
    output.write_text('{"input": 4}\n{"inp')
    before = settings(options)
    assert resume(output, before) == 5 and output.read_text() == '{"input": 4}\n'
    tales.write_text(tales.read_text().replace("Tom", "Tim"))  # as long as before
    with pytest.raises(InputError, match=rf"made with other contents of {tales}"):
        resume(output, settings(options))
    beside = tmp_path / "out.jsonl.settings.json"
    older = {key: value for key, value in before.items() if key not in ("contents", "mesh")}
    beside.write_text(json.dumps(older))  # an earlier release wrote less
    assert resume(output, settings(options)) == 5
    for last in ("[1]", "{}", '{"input": true}', '{"input": "4"}', "[" * 100_000):
        output.write_text(last + "\n")
        with pytest.raises(InputError, match="its last line is no record of distillation"):
            resume(output, settings(options))


def test_an_output_is_written_by_a_single_process(run, tales, tmp_path):
    output = tmp_path / "out.jsonl"
    with locked(tmp_path / "out.jsonl.lock", "the output"):
        code, err = run("--model", "none", "--data", tales, "--words", 3, "--output", output)
    assert code == 2 and "out.jsonl is written by process" in err
    assert not output.exists() and list(tmp_path.iterdir()) == [tales]


@pytest.mark.parametrize("form", ["same", "link"])
def test_the_data_is_not_the_output(run, tales, tmp_path, form):
    output = tales
    if form == "link":
        output = tmp_path / "link.txt"
        output.hardlink_to(tales)
    before = tales.read_bytes()
    code, err = run("--model", "none", "--data", tales, "--words", 3, "--output", output)
    assert code == 2 and f"--output {output} is {tales}, which is read" in err
    assert tales.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "tales.txt, record 1 is plain text: give --words"),
        (["--words", "9-4"], "--words 9-4: expected a number of words N, or a range N-M"),
        (["--shard", "2/2"], "--shard 2/2: expected I/N with 0 <= I < N"),
        (["--acceptance", "nucleus"], "unknown acceptance 'nucleus'"),
        (["--data", "none.jsonl"], "none.jsonl does not exist"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--output", "no/dir/out.jsonl"], "its directory does not exist"),
        (["--output", ""], "expected a file, not a directory"),
        (["--words", "1-" + "9" * 5000], "--words 1-999"),
    ],
)
def test_wrong_flags_exit_with_2_and_one_message(run, tales, tmp_path, flags, message):
    """All of it is found before a model is loaded: there is none here."""
    words = ["--words", 3] if flags else []
    code, err = run("--model", "none", "--data", tales, "--output", tmp_path / "o", *words, *flags)
    assert code == 2 and message in err and err.count("error:") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.e2e
@pytest.mark.slow
def test_the_model_makes_up_questions_that_it_can_be_asked(run, model, tmp_path):
    """Each once; what is cut off is left out; a second run goes on."""
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    flags = [*model, "--chat_template", "zephyr", "--max_new_tokens", 20, "--output", questions]
    code, err = run(*flags, "--questions", 12)
    assert code == 0 and "questions left out" in err
    made = _records(questions)
    assert 0 < len(made) < 12 and len({one["prompt"] for one in made}) == len(made)
    assert all(one["prompt"].endswith(".") for one in made)  # what ends a text of this model
    before = questions.read_bytes()
    questions.write_bytes(before[:-10])
    assert run(*flags, "--questions", 12)[0] == 0
    assert questions.read_bytes() == before
    code, err = run(*model, "--data", questions, "--output", answers, "--chat_template", "zephyr")
    asked = [_values(one)[0] for one in _records(answers)]
    assert code == 0 and asked == [one["prompt"] for one in made]


@pytest.mark.parametrize("flags", [[], ["--data", "a.jsonl", "--questions", 3]])
def test_either_data_or_questions(run, tmp_path, flags):
    code, err = run("--model", "none", "--output", tmp_path / "o", *flags)
    assert code == 2 and "give either" in err and err.count("error:") == 1
