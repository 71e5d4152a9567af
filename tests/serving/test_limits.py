"""What an engine compiles, holds and refuses: long conversations, large batches, broken numbers."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers.models import TINY, TinyModel, random_model

from medusa_jax import Generator
from medusa_jax.checkpoints.parameters import Parameters
from medusa_jax.data.prompts import Request
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.serving import distill_inputs, distill_options, distillation, engine, programs
from medusa_jax.serving.conversations import ROOM, Conversation
from medusa_jax.serving.engine import Engine, run_jobs
from medusa_jax.serving.jobs import Job

BUSHY = Tree.from_lists([[0], [1], [0, 0], [1, 0]])


@pytest.fixture(scope="module")
def generator() -> Generator:
    """The shipped model, decoded plainly."""
    return Generator.load(autoregressive=True, raw=True, max_new_tokens=6)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The programs that are compiled from now on, by their key."""
    monkeypatch.setattr(programs, "_COMPILED", collections.OrderedDict())
    return programs._COMPILED


def names(compiled: dict) -> list[str]:
    return sorted(key[1] for key in compiled)


# --- programs


@pytest.mark.slow
def test_eight_turns_of_a_chat_share_their_programs(generator: Generator, compiled: dict):
    chat = generator.with_tree(Tree()).chat()
    chat.prepare()
    assert names(compiled) == ["empty", "read", "run"]
    for turn in range(8):
        list(chat.say("And then? " * (1 + 2 * (turn % 3))))
    assert len(chat.completion.prompt_ids) > 100
    assert names(compiled) == ["empty", "read", "run"]


@pytest.mark.slow
def test_forty_turns_compile_as_often_as_the_cache_doubles(compiled: dict):
    """A random model of a long context: from 20 to 800 tokens, with room for 512."""
    model = random_model(dataclasses.replace(TINY, context=4096, num_layers=1, windows=(None,)))
    engine = Engine(Decoder(model.config), model.params)
    for turn in range(40):
        job = Job([1 + i % 30 for i in range(20 + 20 * turn)], 2, room=512)
        (output,) = run_jobs(engine, [job])
        assert output.prompt_ids == job.prompt_ids
    assert names(compiled) == ["empty", "empty", "read", "read", "run", "run"]


def test_room_is_what_the_first_turn_suggests():
    talk = Conversation(Request(("a",) * 5))
    assert [talk.room(30), talk.room(100)] == [150, 150]
    assert Conversation(Request(("a",) * 200)).room(30) == ROOM
    assert Conversation(Request(("a", "b"))).room(30) == 0
    assert Conversation(Request(("a",)), open_ended=True).room(30) == ROOM


# --- rows


@pytest.mark.slow
def test_refilled_slots_have_the_penalty_too(tiny: TinyModel):
    """Also a row that outgrows its batch, and rows that a reader ends."""
    decoder = Decoder(tiny.config, drafter_of_heads(tiny.heads, BUSHY))
    jobs = [Job([3 * i + 1, 5], new) for i, new in enumerate((4, 9, 100, 12, 7))]
    short = dataclasses.replace(jobs[3], read=lambda new: min(len(new), 1) or None)
    engine = Engine(decoder, tiny.params, slots=2, repetition_penalty=1.5)
    done = run_jobs(engine, [*jobs, short])
    how = {"repetition_penalty": 1.5}
    for job, output in zip(jobs, done, strict=False):
        state = decoder.prefill(
            tiny.params, [job.prompt_ids], max_new_tokens=job.max_new_tokens, **how
        )
        assert outputs(decoder.generate(tiny.params, state)) == [output]
    assert done[-1].token_ids == done[3].token_ids[:1] and done[-1].finish_reason == "stop"
    assert engine.stats.tokens == sum(len(one.token_ids) for one in done)


def test_a_batch_has_no_more_rows_than_there_are_jobs(tiny: TinyModel):
    engine = Engine(Decoder(tiny.config), tiny.params, slots=1_000_000_000)
    jobs = [Job([1], 2), Job([2], 2), Job([3], 2)]
    for job in jobs:
        engine.submit(job)
    done = []
    while not engine.idle:
        done += [one.job for one in engine.advance(more=False) if one.output]
        assert engine._batch.rows in (0, 4)
    assert done == jobs


def test_a_batch_beyond_the_memory_is_refused(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch):
    """Before anything is allocated, and before more jobs wait than could ever run."""
    monkeypatch.setattr(engine, "memory_bytes", lambda: 10 * 2**20)
    monkeypatch.setattr("medusa_jax.decoding.decoder.memory_bytes", lambda: 10 * 2**20)
    many = Engine(Decoder(tiny.config), tiny.params, slots=1_000_000_000)
    waiting = 0
    while many.hungry:
        many.submit(Job([1], 2))
        waiting += 1
    assert 10 * 2**20 // 2 < waiting * 128 * 256 < 10 * 2**20 * 1.1
    with pytest.raises(InputError, match=r"a cache of \d+ rows of 128 tokens needs 0.0 GiB"):
        many.advance(more=False)


# --- numbers


@pytest.fixture
def broken(generator: Generator) -> Generator:
    """The model with NaN for a token that "Tom" begins with, and other prompts do not."""
    token = generator.text.tokenizer.encode("Tom", add_special_tokens=False)[0]
    params = jax.tree.map(lambda leaf: leaf, generator.model.params)
    embed = params["backbone"]["embed"]
    embed["embedding"] = jax.tree.map(lambda e: e.at[token].set(np.nan), embed["embedding"])
    model = dataclasses.replace(generator.model, parameters=Parameters.of(params))
    options = dataclasses.replace(generator.options, batch_size=2)
    return Generator(model, generator.text, Tree(), generator.acceptance, options)


def test_an_answer_that_fails_is_an_error_after_those_beside_it(broken: Generator):
    asked = [Conversation(Request((text,)), i) for i, text in enumerate(("Once", "Tom", "One"))]
    answered = []
    with pytest.raises(FloatingPointError, match="the prompt: the model's logits are not finite"):
        for update in broken.converse(asked, refuse=True):
            answered += [update.conversation.number] if update.completion else []
    assert 0 in answered and 1 not in answered
    assert broken.engine.idle and asked[1].messages == []
    with pytest.raises(FloatingPointError, match="prompt 0"):
        run_jobs(broken.engine, [Job(broken.text.encode([{"content": "Tom"}]), 3)])


def test_a_failed_row_leaves_nothing_in_its_slot(broken: Generator):
    """NaN in slots that a later row does not see must not reach it: its weight there is 0."""
    tom, once = (broken.text.encode([{"content": name}]) for name in ("Tom", "Once"))
    engine = Engine(broken.engine.decoder, broken.model.params, slots=2)
    jobs = [Job(once, 90), Job(tom * 20, 3), Job(once, 6)]
    for job in jobs:
        engine.submit(job)
    done = {}
    while not engine.idle:
        done |= {one.job: one.output for one in engine.advance() if one.output}
    beside, failed, after = (done[job] for job in jobs)
    assert failed.finish_reason == "failed" and after.finish_reason == "length"
    assert after.token_ids == beside.token_ids[:6]


@pytest.mark.slow
def test_a_long_prompt_does_not_stop_those_beside_it(tiny: TinyModel, monkeypatch):
    """A block at a time, however idle the engine is; a short prompt overtakes it."""
    monkeypatch.setattr("medusa_jax.decoding.prompt_blocks.CPU_BLOCK", 16)
    engine = Engine(Decoder(tiny.config), tiny.params, slots=2)
    long, short = Job([1 + i % 30 for i in range(100)], 3), Job([5, 6], 3)
    engine.submit(long)
    assert engine.advance() == [] and engine.running == 1
    engine.submit(short)
    ended = []
    while not engine.idle:
        ended += [one for one in engine.advance() if one.output]
    assert [one.job for one in ended] == [short, long]
    state = engine.decoder.prefill(tiny.params, [long.prompt_ids], max_new_tokens=3)
    assert ended[1].output == outputs(engine.decoder.generate(tiny.params, state))[0]


@pytest.mark.slow
def test_a_job_too_large_for_the_batch_waits_for_its_rows(tiny: TinyModel, monkeypatch):
    """And a job that never fits is refused when it comes, not when it begins."""
    engine = Engine(Decoder(tiny.config, capacity=100), tiny.params, slots=2)
    monkeypatch.setattr(programs, "SMALLEST_CAPACITY", 32)
    first, large = Job([3], 20), Job([4], 90)
    engine.submit(first)
    engine.advance()
    monkeypatch.setattr(type(engine._batch), "fits", lambda self, rows, tokens=0: tokens < 64)
    engine.submit(large)
    ended = []
    while not engine.idle:
        ended += [one.job for one in engine.advance() if one.output]
    assert ended == [first, large]
    monkeypatch.setattr("medusa_jax.decoding.decoder.memory_bytes", lambda: 2**10)
    with pytest.raises(InputError, match="a cache of 1 rows of"):
        engine.submit(large)


def test_distillation_leaves_out_what_fails(broken: Generator):
    inputs = [(i, Request((text,))) for i, text in enumerate(("Once", "Tom", "One"))]
    ended = list(distillation.in_order(broken, inputs, distillation.Answers()))
    assert [bool(one.completions) for one in ended] == [True, False, True]
    assert isinstance(ended[1].problem, FloatingPointError)
    skipped = distill_inputs.Skipped("skip")
    skipped.add(ended[1].problem)
    assert skipped.count == 1 and "not finite" in str(skipped)


def test_distillation_without_a_finite_answer_fails(broken: Generator, monkeypatch, tmp_path):
    monkeypatch.setattr(distillation, "load_generator", lambda *_, **__: broken)
    for text in ("Tom", "Once"):
        (tmp_path / f"{text}.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    data = [str(tmp_path / "Tom.jsonl")]
    with pytest.raises(FloatingPointError, match="not finite"):
        distillation.distill(
            distill_options.DistillOptions(data=data, output=str(tmp_path / "none.jsonl"))
        )
    data += [str(tmp_path / "Once.jsonl")]
    distillation.distill(
        distill_options.DistillOptions(data=data, output=str(tmp_path / "some.jsonl"))
    )
    assert len((tmp_path / "some.jsonl").read_text().splitlines()) == 1


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2**64}, "seed must be at most 18446744073709551615"),
        ({"seed": -(2**63) - 1}, "seed must be at least -9223372036854775808"),
        ({"batch_size": 2**31}, "batch_size must be at most 2147483647"),
        ({"max_new_tokens": 10**30}, "max_new_tokens must be at most 2147483647"),
        ({"stop_id": [2**40]}, "stop_id must be at most 2147483647"),
        ({"stop_id": [4096]}, r"stop_id 4096 must lie in 0\.\.\d+, the model's vocabulary"),
        ({"suppress_tokens": [-1]}, r"suppress_tokens -1 must lie in 0\.\."),
        ({"suppress_tokens": list(range(4096))}, "suppress_tokens leaves no token"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be > 0"),
    ],
)
def test_wrong_options_are_named(generator: Generator, options: dict, message: str):
    assert generator.model.config.vocab_size == 4096
    with pytest.raises(InputError, match=message):
        Generator.load(**options)


def test_the_models_own_penalty_is_the_default(generator: Generator):
    own = dataclasses.replace(generator.model, repetition_penalty=1.1)
    parts = generator.text, Tree(), generator.acceptance
    assert Generator(own, *parts, generator.options).repetition_penalty == 1.1
    chosen = dataclasses.replace(generator.options, repetition_penalty=1.0)
    assert Generator(own, *parts, chosen).repetition_penalty == 1.0
