"""Documents to rows and rows to batches: nothing lost, nothing twice, nothing mixed up."""

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from medusa_jax.data.encoding import Encoded
from medusa_jax.data.loader import Batches, in_order
from medusa_jax.data.packing import Rows, fit, pack, row
from medusa_jax.errors import InputError


def _document(ids: Sequence[int], learnt: Sequence[int], origin: str = "") -> Encoded:
    return Encoded(np.asarray(ids, np.int32), np.asarray(learnt, bool), origin)


def _documents(lengths: Sequence[int], seed: int = 0) -> list[Encoded]:
    """Documents of tokens that occur once: each token number is a place in one document."""
    rng = np.random.default_rng(seed)
    stops = np.cumsum(lengths)
    return [
        _document(np.arange(stop - n, stop) + 1, rng.random(n) < 0.6, f"record {i}")
        for i, (n, stop) in enumerate(zip(lengths, stops, strict=True))
    ]


def _pieces_of(rows: Rows) -> list[tuple[bytes, bytes]]:
    """The pieces that the arrays of all rows hold, read back from segments and positions."""
    arrays = rows.arrays(range(len(rows)))
    found = []
    for tokens, segments, positions, learnt in zip(
        *(arrays[key] for key in ("tokens", "segments", "positions", "learnt")), strict=True
    ):
        used = np.count_nonzero(segments)
        assert (segments[:used] > 0).all() and not segments[used:].any()  # padding comes last
        assert not tokens[used:].any() and not positions[used:].any() and not learnt[used:].any()
        assert set(segments[:used]) == set(range(1, segments.max() + 1))
        assert (np.diff(segments[:used]) >= 0).all()
        for number in range(1, segments.max() + 1):
            here = segments == number
            np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
            found.append((tokens[here].tobytes(), learnt[here].tobytes()))
    return sorted(found)


def _contents(pieces: Sequence[Encoded]) -> list[tuple[bytes, bytes]]:
    return sorted((piece.ids.tobytes(), piece.learnt.tobytes()) for piece in pieces)


def test_a_row():
    made = row([_document([5, 6, 7], [0, 1, 1]), _document([8, 9], [0, 1])], 6)
    assert {key: array.astype(int).tolist() for key, array in made.items()} == {
        "tokens": [5, 6, 7, 8, 9, 0],
        "segments": [1, 1, 1, 2, 2, 0],
        "positions": [0, 1, 2, 0, 1, 0],
        "learnt": [0, 1, 1, 0, 1, 0],
    }
    assert {made[key].dtype for key in ("tokens", "segments", "positions")} == {np.dtype("int32")}
    assert made["learnt"].dtype == bool


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_every_piece_is_in_one_row(packing, seed):
    length = 32
    rng = np.random.default_rng(seed)
    pieces = _documents(rng.integers(2, length + 1, 400 + 300 * seed), seed)
    rows = pack(pieces, length, packing=packing, seed=seed)
    assert sorted(i for plan in rows.plan for i in plan) == list(range(len(pieces)))
    assert max(sum(len(pieces[i].ids) for i in plan) for plan in rows.plan) <= length
    assert _pieces_of(rows) == _contents(pieces)
    assert sum(len(piece.ids) for piece in rows.pieces) == sum(len(piece.ids) for piece in pieces)
    assert len(rows) < len(pieces) if packing else len(rows) == len(pieces)
    again = pack(pieces, length, packing=packing, seed=seed)
    other = pack(pieces, length, packing=packing, seed=seed + 1)
    assert rows.plan == again.plan != other.plan


def test_full_rows_and_exact_fits():
    """Pieces of T fill a row each; others find those that fill up theirs."""
    lengths = [8, 4, 8, 4, 6, 2]
    rows = pack(_documents(lengths), 8, packing=True, seed=0)
    assert [sum(lengths[i] for i in plan) for plan in rows.plan] == [8] * 4


def test_best_fit():
    """The piece of 3 goes where exactly 3 are free, not where 5 are."""
    for seed in range(5):
        plan = pack(_documents([7, 5, 3]), 8, packing=True, seed=seed).plan
        assert sorted(map(sorted, plan)) == [[0], [1, 2]]
        plan = pack(_documents([7, 5, 3]), 10, packing=True, seed=seed).plan
        assert sorted(map(sorted, plan)) == [[0, 2], [1]]


def test_rows_are_in_random_order():
    """The first rows, which is what an evaluation takes, are not those of the longest pieces."""
    lengths = [8] * 50 + [2] * 200
    plan = pack(_documents(lengths), 8, packing=True, seed=0).plan
    assert 10 < sum(len(numbers) == 1 for numbers in plan[:50]) < 40


def test_rows_of_stories_are_filled():
    """Lengths as of TinyStories (median 200 tokens) in rows of 512, and of chats in 2048."""
    rng = np.random.default_rng(0)
    for length, median, spread, count in ((512, 200, 0.4, 4000), (2048, 500, 0.9, 2000)):
        lengths = np.clip(rng.lognormal(np.log(median), spread, count).astype(int), 2, length)
        rows = pack(_documents(lengths), length, packing=True, seed=0)
        filled = sum(len(piece.ids) for piece in rows.pieces) / (len(rows) * length)
        assert filled > 0.95


def test_empty_rows():
    rows = pack(_documents([3, 4]), 5, packing=True, seed=0)
    arrays = rows.arrays([1, -1])
    assert all(array.shape == (2, 5) for array in arrays.values())
    assert arrays["segments"][0].any() and not any(array[1].any() for array in arrays.values())


def test_a_text_goes_on_and_a_conversation_is_cut():
    text = _document(range(1, 12), [0, *[1] * 10], "text")
    talk = _document(range(21, 32), [0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1], "talk")
    pieces = fit([text, talk], 4, "a.jsonl")
    assert [(p.ids.tolist(), p.learnt.astype(int).tolist(), p.origin) for p in pieces] == [
        ([1, 2, 3, 4], [0, 1, 1, 1], "text"),
        ([5, 6, 7, 8], [1, 1, 1, 1], "text"),
        ([9, 10, 11], [1, 1, 1], "text"),
        ([21, 22, 23, 24], [0, 1, 1, 0], "talk"),
    ]


def test_a_text_of_a_tokenizer_without_bos_goes_on_too():
    assert len(fit([_document(range(9), [1] * 9)], 4, "a")) == 2  # the ninth has none before it


def test_pieces_without_anything_to_learn_are_dropped():
    """A row's first token is read only: there is nothing before it to predict it from."""
    kept = _document([1, 2, 3], [0, 0, 1])
    documents = [
        _document([4, 5, 6, 7, 8], [0, 0, 0, 0, 1]),  # the answer lies beyond the cut
        _document([4, 5], [1, 0]),
        _document([4], [1]),
        _document([], []),
        kept,
    ]
    (piece,) = fit(documents, 4, "a")
    assert piece.ids.tolist() == kept.ids.tolist()


def test_nothing_left():
    documents = _documents([5, 9])
    late = [_document(d.ids, np.arange(len(d.ids)) == 4) for d in documents]
    with pytest.raises(
        InputError, match=r"a\.jsonl, b\.txt: of 2 documents .* 4 \(the longest has 9 tokens\)"
    ):
        fit(late, 4, "a.jsonl, b.txt")
    with pytest.raises(InputError, match="of 0 documents"):
        fit([], 4, "a.jsonl")


def _one_device() -> NamedSharding:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    return NamedSharding(mesh, PartitionSpec(None, "data", None))


def _batches(count: int = 23, size: int = 6, accumulation: int = 2, seed: int = 0) -> Batches:
    rows = pack(_documents([4] * count), 5, packing=False, seed=0)
    return Batches(rows, size, accumulation, seed, _one_device())


def _flat(lists: list[list]) -> list:
    return list(itertools.chain.from_iterable(lists))


def test_an_epoch_visits_rows_once_in_an_order_of_its_own():
    batches = _batches()
    assert batches.steps_per_epoch == 3
    epochs = [[batches.row_numbers(3 * e + i).tolist() for i in range(3)] for e in range(6)]
    for steps in epochs:
        seen = _flat(steps)
        assert len(set(seen)) == len(seen) == 18 and set(seen) <= set(range(23))
    assert len({tuple(_flat(steps)) for steps in epochs}) == 6
    assert set(_flat(_flat(epochs))) == set(range(23))  # those left over come in later


def test_batches_depend_on_seed_and_step_alone():
    one, other, reseeded = _batches(), _batches(), _batches(seed=1)
    late = one.row_numbers(40).tolist()
    one.row_numbers(0)
    assert other.row_numbers(40).tolist() == one.row_numbers(40).tolist() == late
    assert reseeded.row_numbers(40).tolist() != late


def test_a_batch_holds_the_rows_of_its_step():
    batches = _batches()
    for step in (0, 2, 7):
        made = batches(step)
        expected = batches.rows.arrays(batches.row_numbers(step))
        assert made.keys() == expected.keys()
        for key, array in made.items():
            assert array.shape == (2, 3, 5) and array.dtype == expected[key].dtype
            np.testing.assert_array_equal(array.reshape(6, 5), expected[key])


def test_more_rows_in_a_batch_than_there_are():
    with pytest.raises(InputError, match=r"makes 5 rows of 5 tokens.*optim\.batch_size 6"):
        _batches(count=5)
    assert _batches(count=6).steps_per_epoch == 1


@pytest.mark.parametrize(
    ("count", "size", "limit"), [(10, 4, 0), (8, 4, 0), (3, 4, 99), (10, 4, 7)]
)
def test_evaluation_takes_every_row_once(count, size, limit):
    rows = pack(_documents([4] * count), 5, packing=False, seed=0)
    numbers = in_order(rows, size, limit)
    expected = min(count, limit or count)
    assert len(numbers) == -(-expected // size)
    assert {one.shape for one in numbers} == {(1, size)}
    flat = np.concatenate(numbers, axis=1)[0].tolist()
    assert flat[:expected] == list(range(expected)) and set(flat[expected:]) <= {-1}


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from medusa_jax.data.loader import Batches, global_arrays, in_order
from medusa_jax.data.packing import Rows
from test_packing import _documents, pack

class Watched(Rows):
    made = []
    def arrays(self, rows):
        self.made.extend(rows)
        return super().arrays(rows)

assert jax.device_count() == 4
rows = Watched(**vars(pack(_documents([3, 5, 4, 2, 5, 1, 3] * 5), 5, packing=True, seed=0)))
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
for axes, share in ((("data", "fsdp"), 1), ("data", 2), (None, 4)):
    batches = Batches(rows, 8, 2, 0, NamedSharding(mesh, P(None, axes, None)))
    numbers = batches.row_numbers(3)
    rows.made.clear()
    made = batches(3)
    assert sorted(rows.made) == sorted(numbers)  # every row once, however many devices want it
    expected = Rows.arrays(rows, numbers)
    for key, array in made.items():
        np.testing.assert_array_equal(array, expected[key].reshape(2, 4, 5))
        for shard in array.addressable_shards:
            assert shard.data.shape == (2, share, 5)
            np.testing.assert_array_equal(shard.data, expected[key].reshape(2, 4, 5)[shard.index])
last = in_order(rows, 8, 0)[-1]
assert (last == -1).any()
made = global_arrays(rows, last, NamedSharding(mesh, P(None, ("data", "fsdp"), None)))
np.testing.assert_array_equal(np.asarray(made["segments"]).any(-1), last >= 0)
"""


@pytest.mark.e2e
def test_a_batch_is_the_same_on_four_devices():
    """Made shard by shard, on as many devices as a process of its own can pretend to have."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.path.dirname(__file__),
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
