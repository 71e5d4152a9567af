"""Prompt files: every form of record, and every way to get one wrong."""

import gzip
import json

import pytest

from medusa_jax.data.prompts import Request, read_requests, record_line
from medusa_jax.errors import InputError


def _read(tmp_path, *lines: str) -> list[Request]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return list(read_requests(file))


def test_every_form(tmp_path):
    hi = {"role": "user", "content": "Hi"}
    hello = {"role": "assistant", "content": "Hello"}
    requests = _read(
        tmp_path,
        '{"prompt": "Once", "extra": 1}',
        "",
        '{"turns": ["a", "b"], "question_id": 81}',
        json.dumps({"messages": [hi, hello, hi], "id": "x"}),
        json.dumps(
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                    {"from": "human", "value": "Bye"},
                    {"from": "gpt", "value": "left out"},
                ]
            }
        ),
        '{"prompt_ids": [1, 2]}',
    )
    bodies = [(r.turns, r.history, r.prompt_ids, r.id) for r in requests]
    assert bodies == [
        (("Once",), (), (), None),
        (("a", "b"), (), (), 81),
        (("Hi",), (hi, hello), (), "x"),
        (("Bye",), (hi, hello), (), None),
        ((), (), (1, 2), None),
    ]
    assert requests[1].origin.endswith("prompts.jsonl, line 3")


def test_compressed_files(tmp_path):
    file = tmp_path / "prompts.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.write('{"prompt": "月"}\n')
    assert next(read_requests(file)).turns == ("月",)


@pytest.mark.parametrize(
    ("name", "count", "named"),
    [
        ("mt_bench/question.jsonl", 80, True),
        ("spec_bench/question.jsonl", 480, True),
        ("gsm8k/test.jsonl", 1319, False),
        ("humaneval/HumanEval.jsonl.gz", 164, False),
    ],
)
def test_published_prompt_sets(shared, name, count, named):
    requests = list(read_requests(shared / "prompts" / name))
    assert len(requests) == count
    assert all(request.turns and request.turns[0] for request in requests)
    assert all((request.id is not None) == named for request in requests)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "cut', "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"text": "a"}', "expected one of the keys prompt, .*got text"),
        ("{}", "got none"),
        ('{"prompt": 3}', "'prompt' must be a string"),
        ('{"question": []}', "'question' must be a string"),
        ('{"turns": []}', "'turns' must be a non-empty list of str"),
        ('{"prompt_ids": [1, true]}', "'prompt_ids' must be a non-empty list of int"),
        ('{"prompt_ids": [-1]}', "'prompt_ids' must be an integer from 0"),
        (f'{{"prompt_ids": [{2**70}]}}', "'prompt_ids' must be an integer from 0"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] needs a text"),
        ('{"conversations": [{"from": "cat", "value": ""}]}', "unknown speaker 'cat'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no user turn"),
    ],
)
def test_a_bad_line_is_named_after_the_good_ones_were_read(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n' + line + "\n")
    requests = read_requests(file)
    assert next(requests).turns == ("a",)
    with pytest.raises(InputError, match=message) as raised:
        next(requests)
    assert f"{file}, line 3" in str(raised.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl"):
        next(read_requests(tmp_path / "none.jsonl"))
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="broken"):
        next(read_requests(tmp_path / "broken.jsonl.gz"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(InputError, match="latin"):
        next(read_requests(tmp_path / "latin.jsonl"))


def test_a_record_is_one_line():
    assert record_line({"text": "a\nb月"}) == '{"text": "a\\nb月"}'
