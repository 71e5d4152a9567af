"""The engine: slots that a queue refills write the texts of single rows, whatever runs beside."""

import dataclasses

import jax
import pytest
from helpers.models import TinyModel

from medusa_jax.checkpoints.weight_layout import for_decoding
from medusa_jax.decoding.acceptance import Greedy, Lossless, PerRow, Typical
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.sampling import row_keys
from medusa_jax.decoding.state import Output, outputs
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.kernels import native
from medusa_jax.serving import load as module
from medusa_jax.serving.engine import Engine, run_jobs
from medusa_jax.serving.jobs import Job
from medusa_jax.serving.load import next_steps

TREES = [Tree(), Tree.from_lists([[0], [1], [0, 0], [1, 0]]), DynamicTree(6, 3, 4)]
# Unequal prompts and lengths; job 5 outgrows the capacity that the first jobs need.
SHAPES = [(3, 20), (1, 4), (7, 40), (2, 9), (5, 1), (30, 90), (4, 17), (2, 30), (6, 2), (3, 12)]
JOBS = [
    Job([(7 * i + k) % 37 + 1 for k in range(size)], new, (i, i % 2))
    for i, (size, new) in enumerate(SHAPES)
]


def decoder_of(model: TinyModel, tree: Tree | DynamicTree, scheme: object) -> Decoder:
    return Decoder(model.config, drafter_of_heads(model.heads, tree), scheme)


def single(decoder: Decoder, params: dict, job: Job, **ends: object) -> Output:
    """The job in a batch of its own."""
    keys = row_keys(5 if job.seed is None else job.seed, [job.stream])
    state = decoder.prefill(
        params, [job.prompt_ids], max_new_tokens=job.max_new_tokens, keys=keys, **ends
    )
    (output,) = outputs(decoder.generate(params, state))
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tree", "scheme"),
    [(TREES[0], Lossless(0.9)), (TREES[1], Greedy()), (TREES[2], Lossless(0.9))],
    ids=["plain", "static", "dynamic"],
)
def test_refilled_slots_write_what_single_rows_write(
    tiny: TinyModel, tree: Tree | DynamicTree, scheme: object
):
    decoder = decoder_of(tiny, tree, scheme)
    engine = Engine(decoder, tiny.params, slots=3, stop_ids=(2,), seed=5)
    done = run_jobs(engine, JOBS)
    for job, output in zip(JOBS, done, strict=True):
        assert output == single(decoder, tiny.params, job, stop_ids=(2,))
    assert engine.idle
    stats = engine.stats
    assert stats.tokens == sum(len(output.token_ids) for output in done)
    assert stats.steps == sum(len(output.tokens_per_step) for output in done)
    assert stats.prompts == len(JOBS)
    assert 0 < stats.decode_seconds < stats.seconds


# Greedy, sampled and typical rows; hot, cold, cut in both ways; with own seeds and stop tokens.
SETTINGS = [(0.0, 0, 1.0), (0.9, 0, 1.0), (1.3, 5, 1.0), (0.7, 0, 0.8), (1.0, 7, 0.9)]
SETTINGS += [(1e-40, 0, 1.0), (0.0, 3, 0.5), (0.7, 0, 1.0, True)]


@pytest.mark.slow
def test_rows_with_settings_of_their_own_write_what_they_write_alone(tiny: TinyModel):
    jobs = [
        dataclasses.replace(
            job,
            sampling=SETTINGS[i % len(SETTINGS)],
            seed=(None, 3, -(2**40))[i % 3],
            stop_ids=(None, (), (2, 4, 30, 11))[i % 3],
        )
        for i, job in enumerate(JOBS)
    ]
    decoder = decoder_of(tiny, TREES[1], PerRow())
    engine = Engine(decoder, tiny.params, slots=4, stop_ids=(2,), seed=5)
    for job, output in zip(jobs, run_jobs(engine, jobs), strict=True):
        temperature, top_k, top_p, *typical = job.sampling
        scheme = Lossless(temperature, top_k, top_p) if temperature else Greedy()
        scheme = Typical(temperature) if any(typical) else scheme
        alone = dataclasses.replace(decoder, acceptance=scheme)
        stops = (2,) if job.stop_ids is None else job.stop_ids
        assert output == single(alone, tiny.params, job, stop_ids=stops)


def test_stop_tokens_of_a_job_are_bounded(tiny: TinyModel):
    per_row = Engine(decoder_of(tiny, Tree(), PerRow()), tiny.params)
    per_row.submit(Job([1], 4, stop_ids=range(3, 11)))
    with pytest.raises(InputError, match="has 9 stop tokens; at most 8 are"):
        per_row.submit(Job([1], 4, stop_ids=range(3, 12)))
    with pytest.raises(InputError, match="at most 0"):
        Engine(Decoder(tiny.config), tiny.params).submit(Job([1], 4, stop_ids=[3]))


@pytest.mark.slow
def test_rows_are_reported_as_they_end_and_their_slots_refilled(tiny: TinyModel):
    """Two slots: a long row runs on while three short ones pass through the other slot."""
    engine = Engine(Decoder(tiny.config), tiny.params, slots=2)
    long, *short = [Job([4, 9], 60), *[Job([5 + i], 6) for i in range(3)]]
    for job in (long, *short):
        engine.submit(job)
    order, texts = [], {job: [] for job in (long, *short)}
    while not engine.idle:
        for progress in engine.advance():
            texts[progress.job] += progress.token_ids
            if progress.output is not None:
                order.append(progress.job)
                assert texts[progress.job] == progress.output.token_ids
                assert progress.seconds <= engine.stats.seconds
    assert order == [*short, long]
    # One row of six steps after the other, beside 60 steps of the long row.
    assert engine.stats.passes == 60


@pytest.mark.slow
def test_an_engine_compiles_nothing_after_warm_up(tiny: TinyModel):
    engine = Engine(decoder_of(tiny, TREES[1], Greedy()), tiny.params, slots=2)
    engine.warm_up(16, 20)
    run_jobs(engine, [Job([1, 2, 3], 20) for _ in range(3)])
    spent = engine.stats.compile_seconds
    compiled: list[str] = []
    listener = lambda event, seconds, **_: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        run_jobs(engine, [Job([3] * 9, 30, (i, 0)) for i in range(5)])
    finally:
        jax.monitoring.clear_event_listeners()
    assert engine.stats.compile_seconds == spent
    assert not [event for event in compiled if "backend_compile" in event]


def test_a_first_token_is_not_kept_back(tiny: TinyModel):
    """A text begins with a call of a single step, though other rows are in longer calls."""
    engine = Engine(decoder_of(tiny, TREES[0], Greedy()), tiny.params, slots=2)
    engine.submit(Job([5], 60))
    assert [len(progress.steps) for progress in engine.advance()] == [1]
    engine.advance()
    engine.submit(Job([6], 60))
    assert [len(progress.steps) for progress in engine.advance()] == [1, 1]


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="no C++ compiler: padding is not free")
@pytest.mark.parametrize("tree", TREES[1:], ids=["static", "dynamic"])
def test_a_long_prompt_in_small_blocks_beside_others_is_the_same(
    tiny: TinyModel, tree: Tree, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("medusa_jax.decoding.prompt_blocks.CPU_BLOCK", 16)
    monkeypatch.setattr("medusa_jax.serving.slots.SMALL_BLOCK", 8)
    params = for_decoding(tiny.params, few_rows=True)
    decoder = decoder_of(tiny, tree, Greedy())
    jobs = [Job([3, 1, 4], 60), Job([i % 37 + 1 for i in range(100)], 20), Job([5, 9], 40)]
    engine = Engine(decoder, params, slots=3)
    blocks = set()
    read = engine._batch.read

    def watched(*place: object, **how: object) -> int:
        blocks.add(count := read(*place, **how))
        return count

    engine._batch.read = watched
    for job, output in zip(jobs, run_jobs(engine, jobs), strict=True):
        assert output == single(decoder, params, job)
    assert 8 in blocks


@pytest.mark.slow
def test_a_cancelled_job_frees_its_slot(tiny: TinyModel):
    engine = Engine(Decoder(tiny.config), tiny.params, slots=1)
    first, waiting, last = Job([1], 100), Job([2], 100), Job([3], 5)
    for job in (first, waiting, last):
        engine.submit(job)
    engine.advance()
    engine.cancel(first)
    engine.cancel(waiting)
    done = []
    while not engine.idle:
        done += [progress for progress in engine.advance() if progress.output is not None]
    (progress,) = done
    assert progress.job is last
    assert progress.output == single(Decoder(tiny.config), tiny.params, last)


def test_a_job_may_come_before_those_that_wait(tiny: TinyModel):
    engine = Engine(Decoder(tiny.config), tiny.params, slots=1)
    for name in (1, 2):
        engine.submit(Job([name], 2))
    engine.submit(Job([3], 2), next=True)
    ended = []
    while not engine.idle:
        ended += [p.job.prompt_ids[0] for p in engine.advance() if p.output is not None]
    assert ended == [3, 1, 2]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job([], 3), "the second is empty"),
        (Job([40], 3), "the second: token ids must lie in 0..39"),
        (Job([1] * 100, 60), "the second has 100 tokens and 60 new ones were asked for"),
    ],
)
def test_a_job_that_cannot_be_decoded_is_refused(tiny: TinyModel, job: Job, message: str):
    engine = Engine(Decoder(tiny.config), tiny.params)
    with pytest.raises(InputError, match=message):
        engine.submit(job, "the second")
    assert engine.idle


def test_calls_grow_until_they_take_their_time(monkeypatch: pytest.MonkeyPatch):
    assert next_steps(4, 4, 0.01) == 16
    assert next_steps(16, 16, 0.04) == 40
    assert next_steps(40, 40, 4.0) == 1
    assert next_steps(200, 200, 1e-3) == module.MOST_STEPS
    monkeypatch.setattr("jax.process_count", lambda: 2)  # clocks of two processes differ
    assert next_steps(4, 4, 0.01) == module.SHARED_STEPS
