"""Batch sizes and trees by load: the texts are those of single rows, whatever is chosen."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.hydra import hydra_shape
from helpers.models import TinyModel
from serving.test_engine import JOBS, decoder_of, single

from medusa_jax.decoding.acceptance import Greedy, Lossless
from medusa_jax.drafting.drafter import NoDraft
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.hydra_drafter import HydraDrafter
from medusa_jax.drafting.tree import Tree
from medusa_jax.serving.engine import Engine
from medusa_jax.serving.ladder import Chooser, Ladder, accepted_length, ladder_of, row_sizes
from medusa_jax.serving.load import SHRINK_AFTER, Load

GROWN = DynamicTree(8, 3, 4)


def test_batch_sizes_rise_to_all_slots():
    assert row_sizes(16) == (1, 4, 16)
    assert row_sizes(6) == (1, 4, 6)
    assert row_sizes(1) == (1,)


def test_accepted_lengths_lie_between_those_tuned():
    tuned = [(Tree(((0,),)), 1.5), (DynamicTree(4, 3), 2.5), (Tree(((0,), (1,), (2,))), 2.0)]
    assert [accepted_length(size, tuned) for size in (1, 2, 3, 4, 9)] == [1, 1.5, 2, 2.5, 2.5]
    assert accepted_length(4, []) == pytest.approx(1.8)


def test_a_grown_tree_has_smaller_trees_below_it(tiny: TinyModel):
    drafter = decoder_of(tiny, GROWN, Greedy()).drafter
    ladder = ladder_of(drafter, 4, [])
    assert [each.size for each in ladder.drafters] == [1, 2, 4, 8]
    hydra = HydraDrafter(hydra_shape(tiny), GROWN)
    smaller = [hydra.smaller(dataclasses.replace(GROWN, size=size)) for size in (2, 4)]
    assert ladder_of(hydra, 4, []).drafters == (NoDraft(), *smaller, hydra)
    assert ladder.rows == (1, 4) and list(ladder.lengths) == sorted(ladder.lengths)
    static = decoder_of(tiny, Tree.from_lists([[0], [1]]), Greedy()).drafter
    assert ladder_of(static, 1, []).drafters == (NoDraft(), static)
    assert ladder_of(NoDraft(), 1, []).drafters == (NoDraft(),)


@pytest.mark.parametrize(("token", "pays"), [(0.0, True), (1.0, False)])
def test_a_tree_is_compiled_where_its_tokens_may_pay(tiny: TinyModel, token: float, pays: bool):
    """A step takes 20 s and so much a token; the tree of 8 accepts 2 tokens."""
    tree = decoder_of(tiny, GROWN, Greedy()).drafter
    chooser = Chooser(Ladder((1, 4, 16), (NoDraft(), tree), (1.0, 2.0)))
    assert chooser.wanted(16) == [(16, 0), (1, 0), (4, 0)]  # nobody knows yet
    for _ in range(3):
        chooser.saw(1, 1, 20 + 8 * token, [2])
        chooser.saw(16, 0, 20 + 16 * token, [1])
    assert (1, 1) in chooser.wanted(16) and (16, 0) in chooser.wanted(16)
    assert ((16, 1) in chooser.wanted(16)) == pays  # 148 s beside 36 s, with a token of 1 s
    assert chooser.wanted(1)[:2] == [(1, 0), (1, 1)]  # those of the present batch
    for _ in range(3):
        chooser.saw(16, 1, 40.0, [2])
    assert (16, 1) in chooser.wanted(16)  # it was timed


def test_a_batch_grows_at_once_and_shrinks_later():
    """Each change copies a cache: a user who comes and goes shall not cause two a request."""
    batch: Any = SimpleNamespace(rows=4, can_run=lambda rows, drafter: True)
    load = Load(Ladder((1, 4, 16), (NoDraft(),), (1.0,)), batch, 16)
    assert load.size(5, True) == 16
    for _ in range(2):
        sizes = [load.size(1, True) for _ in range(SHRINK_AFTER - 1)]
        assert set(sizes) == {4}
        assert load.size(4, True) == 4
    assert [load.size(1, True) for _ in range(SHRINK_AFTER)][-1] == 1


def test_the_step_with_most_tokens_a_second_is_chosen():
    """Plain steps take 1 s, those of the tree 2 s alone and 4 s in a batch; it accepts 3 tokens."""
    chooser = Chooser(Ladder((1, 4), (NoDraft(), NoDraft()), (1.0, 3.0)))
    assert chooser.step(1, [0, 1]) == 0  # never timed
    chooser.saw(1, 1, 50.0, [3])  # a first call, which waited for something else
    for rows, seconds in 3 * [(1, (1.0, 2.0)), (4, (1.0, 4.0))]:
        for number in (0, 1):
            chooser.saw(rows, number, seconds[number], [3, 3] if number else [1])
    assert chooser.step(1, [0, 1]) == 1
    assert chooser.step(4, [0, 1]) == 0
    assert chooser.step(1, [0]) == 0  # the other has no program yet
    for _ in range(50):
        chooser.saw(1, 1, 2.0, [1, 1])  # guesses are wrong now
    assert chooser.step(1, [0, 1]) == 0
    assert {chooser.step(1, [0, 1]) for _ in range(100)} == {0, 1}  # it is tried again
    for _ in range(9):
        chooser.saw(1, 1, 9.0, [1, 1])
    assert {chooser.step(1, [0, 1]) for _ in range(100)} == {0}  # hopeless


def test_small_batches_wait_for_their_programs():
    chooser = Chooser(Ladder((1, 4, 16), (NoDraft(),), (1.0,)))
    assert chooser.rows(2, lambda rows: True) == 4
    assert chooser.rows(2, lambda rows: rows == 16) == 16
    assert chooser.rows(2, lambda rows: False) == 16


@pytest.mark.slow
def test_texts_do_not_depend_on_batch_sizes_and_trees(tiny: TinyModel, monkeypatch):
    """Each call takes the next step of the ladder; rows move as the batch grows and shrinks."""
    decoder = decoder_of(tiny, GROWN, Lossless(0.9))
    turns = iter(range(10**6))
    monkeypatch.setattr(Chooser, "step", lambda self, rows, ready: ready[next(turns) % len(ready)])
    monkeypatch.setattr("medusa_jax.serving.load.MOST_STEPS", 3)
    ladder = ladder_of(decoder.drafter, 4, [])
    ladder = dataclasses.replace(ladder, drafters=(ladder.drafters[0], *ladder.drafters[2:]))
    engine = Engine(decoder, tiny.params, slots=4, stop_ids=(2,), seed=5, ladder=ladder)
    for rows in ladder.rows:
        for drafter in ladder.drafters:
            engine._batch.warm_up(JOBS[0], JOBS[0].tokens, rows, drafter)
    sizes, done = set(), {}
    coming = list(JOBS)
    while coming or not engine.idle:
        if coming and len(sizes) % 3 != 1:
            engine.submit(coming.pop(0))
        for progress in engine.advance():
            if progress.output is not None:
                done[progress.job] = progress.output
        sizes.add(engine._batch.rows)
        coming and engine.submit(coming.pop(0))
    engine.close()
    assert {1, 4} <= sizes
    for job in JOBS:
        alone = single(decoder, tiny.params, job, stop_ids=(2,))
        assert done[job].token_ids == alone.token_ids
        assert done[job].finish_reason == alone.finish_reason
