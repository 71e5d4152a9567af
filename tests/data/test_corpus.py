"""Files and hub datasets to documents: every form, and records that are none."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from medusa_jax.data.corpus import Corpus, Document
from medusa_jax.errors import InputError

SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "月"}]}
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ],
    "id": "x",
    "truncated": True,
}
TEXT = {"text": " Once\n"}
RECORDS = [SHAREGPT, MESSAGES, TEXT]
COLUMNS = [{key: record.get(key) for r in RECORDS for key in r} for record in RECORDS]
TURNS = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "月"})

Write = Callable[[str, Any], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes records, or a file's text as it is, in the form that its name says."""

    def file(name: str, content: Any) -> str:
        path = tmp_path / name
        if not isinstance(content, str):
            lines = "".join(json.dumps(record) + "\n" for record in content)
            content = lines if ".jsonl" in name else json.dumps(content, ensure_ascii=False)
        data = content.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return file


def _bodies(corpus: Corpus) -> list[tuple[Any, ...]]:
    return [(d.messages, d.text, d.truncated, d.id) for d in corpus]


def _texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus]


EXPECTED = [
    (TURNS, "", False, None),
    (tuple(MESSAGES["messages"]), "", True, "x"),
    ((), " Once\n", False, None),
]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_json(write, name):
    assert _bodies(Corpus([write(name, RECORDS)])) == EXPECTED


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_list(COLUMNS).to_parquet(file)
    assert _bodies(Corpus([str(file)])) == EXPECTED
    file.write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"a\.parquet could not be read: .*magic bytes"):
        list(Corpus([str(file)]))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_files(write, name):
    file = write(name, "One\n\nday <|endoftext|>\n月\n<|endoftext|> \n<|endoftext|>")
    assert _texts(Corpus([file])) == ["One\n\nday", "月"]
    assert [text[:3] for text in _texts(Corpus([file], separator="\n\n"))] == ["One", "day"]
    (whole,) = _texts(Corpus([file], separator=""))
    assert whole.count("<|endoftext|>") == 3


def test_a_separator_across_two_reads(write):
    """The file is read in pieces of a megabyte."""
    separator = "<|endoftext|>"
    for cut in range(1, len(separator)):
        first = "a" * (2**20 - cut)
        assert _texts(Corpus([write("a.txt", first + separator + "b")])) == [first, "b"]


def test_sources_in_order_each_up_to_its_limit(write):
    files = [
        write("a.jsonl", [{"text": ""}, {"text": "a1"}, {"text": "a2"}, {"text": "a3"}]),
        write("b.txt", "b1<|endoftext|>b2<|endoftext|>b3"),
        write("c.json", [{"text": "c1"}]),
    ]
    corpus = Corpus(files, max_documents=2)
    documents = list(corpus)
    assert [d.text for d in documents] == ["a1", "a2", "b1", "b2", "c1"]
    assert documents[1].origin == f"{files[0]}, record 3"
    assert len(corpus.skipped) == 1
    assert len(_texts(Corpus(files))) == 7


@pytest.mark.parametrize(
    ("source", "split"), [("owner/name", "train"), ("owner/na-me.v2:train_sft", "train_sft")]
)
def test_hub_datasets(monkeypatch, source, split):
    asked = []

    def load(name: str, **how: Any) -> datasets.Dataset:
        asked.append((name, how))
        return datasets.Dataset.from_list(COLUMNS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = Corpus([source], max_documents=2)
    assert _bodies(corpus) == EXPECTED[:2]
    assert asked == [(source.partition(":")[0], {"split": split, "trust_remote_code": False})]
    assert next(iter(corpus)).origin == f"{source}, record 1"


def test_a_hub_dataset_that_cannot_be_had(monkeypatch):
    def load(name: str, **how: Any) -> datasets.Dataset:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=r"^owner/name could not be read: no network$"):
        list(Corpus(["owner/name"]))


USER, ASSISTANT = ({"from": who, "value": "a"} for who in ("human", "gpt"))
BAD = [
    ({"conversations": [{"value": "a"}, {"value": "b"}]}, r"conversations\[0\] needs a speaker"),
    ({"conversations": []}, "'conversations' must be a non-empty list of turns"),
    ({"conversations": "a"}, "'conversations' must be a non-empty list of turns"),
    ({"conversations": [USER, {"from": "cat", "value": "m"}]}, r"\[1\]: unknown speaker 'cat'"),
    ({"conversations": [USER]}, "no assistant turn"),
    ({"conversations": [ASSISTANT]}, "no assistant turn"),
    ({"conversations": [ASSISTANT, USER]}, "no assistant turn"),
    ({"conversations": [{"from": "human", "value": 3}, ASSISTANT]}, "needs a text"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "needs a text"),
    ({"text": 3}, "expected one of the keys .*; got text"),
    ({"text": " \n"}, "'text' is empty"),
    ({"prompt": "a", "text": None}, "expected one of the keys .*; got prompt"),
    ({}, "got none"),
    (["a"], "expected a JSON object, got list"),
]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_record_is_left_out_or_refused(write, name, record, message):
    """Mixed with good ones, and of types that differ from theirs."""
    file = write(name, [SHAREGPT, record, TEXT])
    corpus = Corpus([file])
    assert [d.origin for d in corpus] == [f"{file}, record 1", f"{file}, record 3"]
    (skipped,) = corpus.skipped
    assert skipped.startswith(f"{file}, record 2: ")
    with pytest.raises(InputError, match=message) as raised:
        list(Corpus([file], on_bad="refuse"))
    assert str(raised.value) == skipped


def test_answers_to_nothing_are_dropped(write):
    record = {"conversations": [ASSISTANT, ASSISTANT, *SHAREGPT["conversations"]]}
    assert _bodies(Corpus([write("a.jsonl", [record])]))[0][0] == TURNS


def test_a_null_key_gives_way_to_the_next(write):
    record = {"conversations": None, "messages": None, "text": "a"}
    assert _texts(Corpus([write("a.jsonl", [record])])) == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_what_other_records_hold_changes_nothing(write, name):
    """Twelve megabytes of one schema, then others: no value is cast, no text becomes a date."""
    common = {"conversations": [USER, {"from": "gpt", "value": "2020-01-01 " * 300}], "id": 1}
    odd = [
        {**SHAREGPT, "id": "b", "extra": {"a": 1}},
        {"conversations": [{**USER, "weight": 0.5}, {**ASSISTANT, "weight": None}], "extra": "s"},
        {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "4"}]},
        {"text": "2020-01-01"},
    ]
    file = write(name, [common] * 4000 + odd)
    assert Path(file).stat().st_size > 12e6
    corpus = Corpus([file])
    documents = list(corpus)
    assert len(documents) == 4003
    assert documents[-3].messages == TURNS and documents[-3].id == "b"
    assert documents[-2].messages[1] == {"role": "assistant", "content": "a"}
    assert documents[-1] == Document(text="2020-01-01", origin=f"{file}, record 4004")
    assert len(corpus.skipped) == 1 and "record 4003" in corpus.skipped[0]


def test_other_shapes_of_json(write):
    lines = '{"text": "a"}\n\n{"text": "b"}\n'
    assert _texts(Corpus([write("lines.json", lines)])) == ["a", "b"]
    assert _texts(Corpus([write("one.json", '{\n "text": "a"\n}')])) == ["a"]
    assert _texts(Corpus([write("bom.jsonl", "\ufeff" + lines)])) == ["a", "b"]
    assert _texts(Corpus([write("separators.jsonl", '{"text": "a\u2028b"}')])) == ["a\u2028b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": "cut', ", line 3: not JSON: Unterminated string"),
        ("a.jsonl.gz", '{"text": "a"}\n{"text": }', ", line 2: not JSON: Expecting value"),
        ("a.json", '{"text": "a"}\n{"text": "cut', ", line 2: not JSON: Unterminated string"),
        ("a.json", '[{"text": "a"},\n {"text" "b"}]', ": not JSON: Expecting ':' .*: line 2 col"),
        ("a.json.gz", '[{"text": "a"}', ": not JSON: Expecting ',' delimiter: line 1 column 15"),
        ("a.json", "", " holds no records"),
        ("a.json", "[]", " holds no records"),
        ("a.jsonl", "\n \n", " holds no records"),
        ("a.txt.gz", "<|endoftext|>\n", " holds no records"),
        ("a.csv", "text\na", ": expected a file .json,"),
        ("a.parquet.gz", "", ": expected a file .json,"),
    ],
)
def test_files_that_hold_no_records(write, name, content, message):
    file = write(name, content)
    with pytest.raises(InputError, match=message) as raised:
        list(Corpus([file], on_bad="refuse"))
    assert str(raised.value).startswith(file + message[:2])
    assert "\n" not in str(raised.value)


DEEP, LONG = "[" * 100_000, '{"text": "a", "id": ' + "9" * 5000 + "}"


@pytest.mark.parametrize("line", ['{"text": "cut o', DEEP, LONG, '{"text": "a"}}'])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_a_line_that_cannot_be_read_costs_nothing_but_itself(write, name, line):
    file = write(name, f'{{"text": "a"}}\n{{"text": "b"}}\n{line}\n{{"text": "c"}}\n')
    corpus = Corpus([file])
    assert [d.origin[-8:] for d in corpus] == ["record 1", "record 2", "record 4"]
    (skipped,) = corpus.skipped
    assert skipped.startswith(f"{file}, line 3: ")
    with pytest.raises(InputError) as raised:
        list(Corpus([file], on_bad="refuse"))
    assert str(raised.value) == skipped


@pytest.mark.parametrize("content", [DEEP, f"[{LONG}]"])
def test_an_array_that_cannot_be_read(write, content):
    file = write("a.json", content)
    with pytest.raises(InputError, match=rf"^{file}: (JSON is nested|not JSON)"):
        list(Corpus([file]))


def test_halves_of_characters_are_no_end(write):
    """As scraped conversations hold them; so every tokenizer takes the text."""
    file = write("a.jsonl", '{"text": "a\\ud83d"}\n{"text": "\\ude00b", "id": "\\ud800"}\n')
    assert [(d.text, d.id) for d in Corpus([file])] == [("a\ufffd", None), ("\ufffdb", "\ufffd")]


def test_unreadable_files(tmp_path):
    whole = gzip.compress(json.dumps(TEXT).encode() * 100)
    spoilt = {
        "none.jsonl": None,
        "latin.jsonl": b'{"text": "\xe9"}',
        "latin.txt": b"caf\xe9 ",
        "no.json.gz": b"no gzip",
        "cut.jsonl.gz": whole[:-9],
        "torn.jsonl.gz": whole[:10] + b"\xff" * 20,
    }
    for name, content in spoilt.items():
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError) as raised:
            list(Corpus([str(file)]))
        assert str(raised.value).startswith(str(file)), name


@pytest.mark.parametrize("source", ["none", "./name", "owner/name:a:b", "a/b/c", "*/name"])
def test_neither_a_file_nor_a_hub_name(source):
    with pytest.raises(InputError, match=r"does not exist.*owner/name"):
        list(Corpus([source]))


@pytest.mark.parametrize("source", ["data/none.jsonl", "data/none.txt.gz", "data/none.parquet"])
def test_a_missing_file_is_not_looked_for_on_the_hub(monkeypatch, source):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=f"^{source} does not exist$"):
        list(Corpus([source]))


def test_the_published_dialogues(shared):
    """FastChat's own example, and the head of a corpus of 17,000."""
    corpus = Corpus(
        [
            str(shared / "chat/fastchat_dummy_conversation.json"),
            str(shared / "chat/sgd_sharegpt.json.gz"),
        ],
        max_documents=300,
        on_bad="refuse",
    )
    documents = list(corpus)
    assert len(documents) == 600
    for document in documents:
        roles = [message["role"] for message in document.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
