"""What `distill` asks a model: conversations, prompts, and the words that a text begins with."""

import json

import pytest

from medusa_jax.data.prompts import Request
from medusa_jax.errors import InputError
from medusa_jax.serving.distill_inputs import Skipped, read, word_range
from medusa_jax.serving.distill_options import DistillOptions
from medusa_jax.serving.distillation import until


def test_what_is_asked_of_conversations(tmp_path):
    """The user's turns after the system's; a tool's answer is to what this model has not asked."""
    talks, prompts = tmp_path / "talks.jsonl", tmp_path / "prompts.jsonl"
    turns = [("Human", "When?"), ("function_call", "now()"), ("tool", "12"), ("GPT", "Noon.")]
    turns += [("prompter", "Sure?"), ("bard", "Yes.")]
    said = [{"from": speaker, "value": value} for speaker, value in turns]
    talks.write_text(json.dumps({"system": "Be brief.", "conversation": said}) + "\nno JSON\n")
    prompts.write_text('{"turns": ["Tom"]}\nno JSON\n{"prompt": "a\\ud800"}\n')
    options = DistillOptions(data=[str(talks), str(prompts)], output="o")
    skipped = Skipped("skip")
    first, *others = read(options, skipped)
    assert first.turns == ("When?", "Sure?")
    assert first.history == ({"role": "system", "content": "Be brief."},)
    assert [other.turns for other in others] == [("Tom",), ("a\ufffd",)]
    assert skipped.count == 2 and f"{talks}, line 2: not JSON" in str(skipped)


def test_time_ends_the_asking_and_nothing_else():
    inputs = [(i, Request(("a",))) for i in range(3)]
    assert list(until(inputs, None)) == list(until(inputs, 5.0)) == inputs
    assert list(until(inputs, -1.0)) == []


def test_word_ranges():
    assert word_range(None) is None
    assert word_range("7") == (7, 7)
    assert word_range("4-12") == (4, 12)
    for flag in ("0", "-3", "4-", "a"):
        with pytest.raises(InputError, match="--words"):
            word_range(flag)
