"""Losses against the recorded float64 reference, in chunks and packed, and their memory."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.head_files import stored
from helpers.models import stacked
from helpers.tiers import slow_except

from medusa_jax.checkpoints.load import Model
from medusa_jax.data.encoding import Encoded
from medusa_jax.data.packing import row
from medusa_jax.model.weight import Weight
from medusa_jax.training.losses import (
    TOP,
    counted_first,
    cross_entropy,
    kl_divergence,
    over_chunks,
    targets_at,
)
from medusa_jax.training.objective import Objective, report


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, Any]:
    """Every loss term and accuracy of a fixed batch, computed in float64 elsewhere."""
    return json.loads((shared / "golden/losses_stories260K.json").read_text())


@pytest.fixture(scope="module")
def params(stories: Model) -> dict[str, Any]:
    """The real model's as training has them: layers stacked, heads apart."""
    return stacked({part: stored(stories.params[part]) for part in ("backbone", "heads")}, 5)


def batch_of(reference: dict[str, Any], layout: list[list[int]], length: int) -> dict[str, Any]:
    """The reference's four documents in rows of `length`, as `layout` says."""
    documents = [
        Encoded(np.asarray(ids, np.int32), np.asarray(mask, bool), "")
        for ids, mask in zip(reference["token_ids"], reference["target_mask"], strict=True)
    ]
    rows = [row([documents[i] for i in numbers], length) for numbers in layout]
    return {key: jnp.stack([one[key] for one in rows]) for key in rows[0]}


LAYOUTS = {
    "unpacked": ([[0], [1], [2], [3]], 64),
    "padded": ([[0], [1], [2], [3]], 75),
    "packed": ([[3, 0], [1, 2]], 128),
    "packed and padded": ([[2, 0, 3], [1]], 200),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", slow_except(LAYOUTS, "packed and padded"))
@pytest.mark.parametrize("chunk", slow_except([0, 16, 37], 16))
def test_losses_equal_the_reference(
    stories: Model, params: dict[str, Any], reference: dict[str, Any], layout: str, chunk: int
):
    batch = batch_of(reference, *LAYOUTS[layout])
    objective = Objective(stories.config, stories.heads, "medusa2", chunk=chunk)
    terms = jax.jit(objective.terms)(params, {}, batch)
    found = report(terms, 0.2, objective)
    assert found["lm_loss"] == pytest.approx(reference["lm_ce"], abs=1e-5)
    assert found["head_losses"] == pytest.approx(reference["head_ce"], abs=1e-5)
    assert found["head_loss"] == pytest.approx(reference["medusa1_loss"], abs=1e-5)
    assert found["loss"] == pytest.approx(reference["medusa2_loss_lambda0_0p2"], abs=1e-5)
    for place, k in enumerate(TOP):
        accuracies = reference["head_topk_accuracy_k_1_3_5_10"].values()
        assert found[f"head_top{k}"] == pytest.approx([one[place] for one in accuracies], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", slow_except([0, 16, 37], 16))
def test_kl_equals_the_reference(
    stories: Model, params: dict[str, Any], reference: dict[str, Any], chunk: int
):
    batch = batch_of(reference, *LAYOUTS["packed"])
    # The reference's student is the teacher with its logits times 1.1, that is, its last norm's.
    teacher = params
    norm = {"scale": 1.1 * teacher["backbone"]["final_norm"]["scale"]}
    student = teacher | {"backbone": teacher["backbone"] | {"final_norm": norm}}
    objective = Objective(stories.config, stories.heads, "medusa2", distill=True, chunk=chunk)
    terms = jax.jit(objective.terms)(student, {"teacher": teacher["backbone"]}, batch)
    assert report(terms, 0.2, objective)["kl"] == pytest.approx(reference["kl_mean"], abs=1e-5)


def test_targets_stay_within_their_document():
    arrays = {
        "tokens": jnp.array([[5, 6, 7, 8, 9]]),
        "segments": jnp.array([[1, 1, 1, 2, 2]]),
        "learnt": jnp.ones((1, 5), bool),
    }
    targets, counted = targets_at(*arrays.values(), 2)
    np.testing.assert_array_equal(targets, [[7, 8, 9, 0, 0]])
    np.testing.assert_array_equal(counted, [[1, 0, 0, 0, 0]])
    arrays["learnt"] = jnp.array([[True, True, False, True, True]])  # of the target, not the source
    assert not targets_at(*arrays.values(), 2)[1].any()
    assert targets_at(*arrays.values(), 1)[1].tolist() == [[True, False, False, True, False]]


def test_counted_positions_come_first():
    counted = jnp.array([[False, True, False, True]])
    np.testing.assert_array_equal(counted_first(counted), [[1, 3, 0, 2]])


@pytest.fixture(scope="module")
def random() -> dict[str, jax.Array]:
    """Hidden states [3, 10, 8], a vocabulary of 20, targets and which of them count."""
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "hidden": jax.random.normal(keys[0], (3, 10, 8)),
        "weight": jax.random.normal(keys[1], (20, 8)),
        "targets": jax.random.randint(keys[2], (3, 10), 0, 20),
        "counted": jax.random.bernoulli(keys[3], 0.7, (3, 10)),
    }


def mean_loss(chunk: int, hidden: Any, weight: Any, targets: Any, counted: Any) -> jax.Array:
    def losses(weight: Any, hidden: Any, counted: Any, targets: Any) -> Any:
        found = cross_entropy(weight.dot(hidden), targets, counted)
        return found.loss, found.count, ()

    loss, count, _ = over_chunks(losses, chunk, Weight(weight), hidden, counted, targets)
    return loss / count


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 3, 5, 10, 64])
def test_gradients_equal_optax(random: dict[str, jax.Array], chunk: int):
    def plain(hidden: Any, weight: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            hidden @ weight.T, random["targets"]
        )
        return jnp.sum(losses * random["counted"]) / random["counted"].sum()

    ours = functools.partial(mean_loss, chunk, targets=random["targets"], counted=random["counted"])
    for mine, theirs in zip(
        jax.value_and_grad(lambda h, w: ours(hidden=h, weight=w), (0, 1))(
            random["hidden"], random["weight"]
        ),
        jax.value_and_grad(plain, (0, 1))(random["hidden"], random["weight"]),
        strict=True,
    ):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), mine, theirs)


def test_hits_count_the_best_logits(random: dict[str, jax.Array]):
    logits = Weight(random["weight"]).dot(random["hidden"])
    order = np.argsort(-np.asarray(logits), axis=-1)
    found = cross_entropy(logits, random["targets"], random["counted"])
    for place, k in enumerate(TOP):
        among = (order[..., :k] == np.asarray(random["targets"])[..., None]).any(-1)
        assert found.hits[place] == (among & np.asarray(random["counted"])).sum()


def test_kl_of_a_distribution_to_itself_is_zero_and_else_positive(random: dict[str, jax.Array]):
    logits = Weight(random["weight"]).dot(random["hidden"])
    assert kl_divergence(logits, logits + 3.0, random["counted"]) == pytest.approx(0, abs=1e-4)
    assert kl_divergence(logits, 2 * logits, random["counted"]) > 1
    none = jnp.zeros((3, 10), bool)
    assert kl_divergence(logits, 2 * logits, none) == 0


def temporaries(heads: int, vocab: int, length: int, chunk: int) -> int:
    """Temporary bytes of the gradient of several heads' losses."""

    def loss(weights: Any, hidden: Any, targets: Any, counted: Any) -> jax.Array:
        return sum(
            mean_loss(chunk, jnp.tanh(hidden), weight, targets, counted) for weight in weights
        )

    arrays = (
        [jax.ShapeDtypeStruct((vocab, 16), jnp.float32)] * heads,
        jax.ShapeDtypeStruct((2, length, 16), jnp.float32),
        jax.ShapeDtypeStruct((2, length), jnp.int32),
        jax.ShapeDtypeStruct((2, length), jnp.bool_),
    )
    compiled = jax.jit(jax.grad(loss)).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_heads_x_vocabulary_x_positions():
    logits = 4 * 2 * 1024 * 4096  # bytes of one head's logits at all positions
    whole = temporaries(heads=4, vocab=4096, length=1024, chunk=0)
    chunked = temporaries(heads=4, vocab=4096, length=1024, chunk=64)
    assert whole > logits  # what the chunks are for
    assert chunked < logits / 2
    # Twice the positions: only hidden states and targets are more, no logits.
    longer = temporaries(heads=4, vocab=4096, length=2048, chunk=64)
    assert longer - chunked < logits / 16
    # Twice the heads: no more logits at a time; each has gradients of its own weights.
    more = temporaries(heads=8, vocab=4096, length=1024, chunk=64)
    assert more - chunked < logits / 16
