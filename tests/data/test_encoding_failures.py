"""Turns of tools and of the system in training, and documents that cannot be encoded."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.talks import CHATML, runs, talk

from medusa_jax.data.corpus import Corpus
from medusa_jax.data.encoding import encode
from medusa_jax.data.messages import read_messages
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.errors import InputError

CALL = {"type": "function", "function": {"name": "time", "arguments": {}}}
TOOLS = CHATML.replace("m.content", "m.content ~ (m.tool_calls or '') | string")
SYSTEMLESS = CHATML.replace("{{ '<", "{% if m.role != 'system' %}{{ '<", 1).replace(
    "\n' }}{% endfor", "\n' }}{% endif %}{% endfor"
)


def _tools(call: dict[str, Any]) -> dict[str, Any]:
    user, said = {"role": "user", "content": "When?"}, {"role": "assistant", "content": "Noon."}
    return {"messages": [user, call, {"role": "observation", "content": "12"}, said]}


@pytest.mark.parametrize(
    ("template", "call", "written"),
    [
        ("zephyr", {"role": "function_call", "content": "now()"}, "now()"),
        (CHATML, {"from": "Function_call", "value": "now()"}, "now()"),
        (TOOLS, {"role": "assistant", "content": None, "tool_calls": [CALL]}, "'time'"),
    ],
)
def test_tools_are_read_and_not_learnt(make, corpus, template, call, written):
    text = make(template)
    (document,) = encode(corpus(_tools(call), on_bad="refuse"), text)
    (learnt,) = runs(text, document)
    assert learnt.startswith("Noon.") and written not in learnt
    whole = text.tokenizer.decode(document.ids)
    assert whole.index("When?") < whole.index(written) < whole.index("12") < whole.index("Noon.")


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        ("vicuna", _tools({"role": "function_call", "content": "now()"}), "turn 3, of role 'tool'"),
        (CHATML, _tools({"role": "assistant", "tool_calls": [CALL]}), "turn 2, of role 'assis"),
        (SYSTEMLESS, talk("a", "b", system="Be brief."), "turn 1, of role 'system'"),
    ],
)
def test_what_a_template_leaves_out_makes_a_record_bad(make, corpus, template, record, message):
    skipping = corpus(record, talk("a", "b"))
    assert len(list(encode(skipping, make(template)))) == 1
    assert f"record 1: the chat template leaves out {message}" in skipping.skipped[0]
    with pytest.raises(InputError, match="leaves out"):
        make(template).encode(read_messages(record, "messages", "a"))


def test_a_document_that_stops_the_tokenizer_costs_nothing_but_itself(make, corpus):
    """All of a batch are tokenized at once; halves of characters come only from other callers."""
    text, docs = make(None), corpus({"text": "Hello"}, {"text": "there"}, {"text": "once"})

    class Spoilt(Corpus):
        def __iter__(self) -> Any:
            for i, document in enumerate(super().__iter__()):
                yield dataclasses.replace(document, text="a\ud800") if i == 1 else document

    spoilt = Spoilt(docs.sources)
    documents = list(encode(spoilt, text))
    assert [text.tokenizer.decode(d.ids) for d in documents] == ["<s>Hello", "<s>once"]
    assert "record 2 cannot be tokenized" in spoilt.skipped[0]


@pytest.mark.parametrize("size", [3, 6, 399])
def test_a_tokenizer_that_is_larger_than_the_model(directory, tmp_path, corpus, size):
    """Found while texts are read; padded rows, of a model that is larger, are fine."""
    own = Path(shutil.copytree(directory, tmp_path / "model"))
    (own / "chat_template.jinja").write_text(CHATML)
    docs = corpus({"text": "a"}, talk("Hello there.", "Hello there."))
    (own / "config.json").write_text(json.dumps({"vocab_size": 1000}))
    assert len(list(encode(docs, ChatTokenizer(own)))) == 2
    (own / "config.json").write_text(json.dumps({"vocab_size": size}))
    if size == 399:  # a token that no text has
        assert len(list(encode(docs, ChatTokenizer(own)))) == 2
        return
    with pytest.raises(InputError, match=rf"record \d: .* ends at {size - 1}: the model was not"):
        list(encode(docs, ChatTokenizer(own)))
    with pytest.raises(InputError, match=r"tokenizer's '.*' is token \d+, but the model's"):
        ChatTokenizer(own).encode([{"role": "user", "content": "Hello"}])
