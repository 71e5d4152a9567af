"""Checkpoints by themselves: which are kept, and that no other values come back."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medusa_jax.errors import InputError
from medusa_jax.training.checkpoints import Checkpoints
from medusa_jax.training.checksums import checksum, checksums
from medusa_jax.training.step import TrainState


def state_of(step: int, size: int = 300) -> TrainState:
    numbers = np.random.default_rng(step).normal(size=(size, 7)).astype(np.float32)
    moments = {"mu": jnp.asarray(numbers * 2), "count": jnp.int32(step)}
    return TrainState(jnp.int32(step), {"heads": {"vocab": jnp.asarray(numbers)}}, (moments,))


def shapes_of(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def written(workdir: Path, losses: dict[int, float | None], keep: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(workdir, keep)
    for step, loss in losses.items():
        checkpoints.save(state_of(step), loss)
    checkpoints.wait()
    return checkpoints


def test_the_best_evaluated_checkpoint_stays_beside_the_newest(tmp_path: Path):
    losses = {1: 3.0, 2: 1.5, 3: None, 4: 2.0, 5: None, 6: 1.6}
    checkpoints = written(tmp_path, losses, keep=2)
    assert checkpoints.steps == [2, 5, 6]
    checkpoints.close()
    again = written(tmp_path, {7: None, 8: 1.4, 9: None, 10: None}, keep=2)  # as when it resumes
    assert again.steps == [8, 9, 10]
    again.close()


def flip(file: Path, place: float) -> None:
    """Flips a bit of the byte at that share of a file."""
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 4
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["bit 0.2", "bit 0.5", "bit 0.8", "half", "gone", "checksum"])
def test_a_damaged_checkpoint_is_refused_and_an_older_one_is_offered(tmp_path: Path, harm: str):
    written(tmp_path, {3: None, 6: None}).close()
    place = tmp_path / "checkpoints/6"
    data = max(place.rglob("d/*"), key=lambda file: file.stat().st_size)
    if harm == "half":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif harm == "gone":
        data.unlink()
    elif harm == "checksum":
        file = place / "_CHECKPOINT_METADATA"
        about = json.loads(file.read_text())
        about["custom_metadata"]["checksums"]["trainable/heads/vocab"] ^= 1
        file.write_text(json.dumps(about))
    else:
        flip(data, float(harm.split()[1]))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(InputError) as refused:
        checkpoints.restore(shapes_of(state_of(6)), 6)
    message = str(refused.value)
    assert f"{place} is no whole checkpoint of this run: " in message
    assert f"Older ones: 3; delete {place} to go on from 3" in message
    assert "bound method" not in message and "\n" not in message
    if harm == "checksum":
        assert "trainable/heads/vocab holds other values than were written" in message
    restored = checkpoints.restore(shapes_of(state_of(3)), 3)
    np.testing.assert_array_equal(
        restored.trainable["heads"]["vocab"], state_of(3).trainable["heads"]["vocab"]
    )


@pytest.mark.slow
def test_the_only_checkpoint_is_damaged(tmp_path: Path):
    written(tmp_path, {4: 1.0}).close()
    (tmp_path / "checkpoints/4/default/manifest.ocdbt").write_bytes(b"")
    with pytest.raises(InputError, match="No older one is kept: give another --workdir"):
        Checkpoints(tmp_path).restore(shapes_of(state_of(4)), 4)


def test_a_file_in_place_of_the_checkpoints(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("x")
    for keep in (None, 3):
        with pytest.raises(InputError, match="is a file, expected the directory of checkpoints"):
            Checkpoints(tmp_path, keep)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_each_flipped_bit_changes_the_checksum(dtype: str):
    array = np.random.default_rng(0).integers(0, 100, (5, 3, 4)).astype(jnp.dtype(dtype))
    before = int(checksum(array))
    for bit in np.random.default_rng(1).integers(0, 8 * array.nbytes, 30):
        content = bytearray(array.tobytes())
        content[bit // 8] ^= 1 << bit % 8
        other = np.frombuffer(bytes(content), array.dtype).reshape(array.shape)
        assert int(checksum(other)) != before


def test_the_place_of_an_element_counts():
    assert int(checksum(jnp.array([1, 2]))) != int(checksum(jnp.array([2, 1])))
    assert int(checksum(jnp.zeros(3))) != int(checksum(jnp.zeros(4)))
    found = checksums({"a": {"b": jnp.ones((2, 2))}, "c": (jnp.zeros((), bool),)})
    assert list(found) == ["a/b", "c/0"]
