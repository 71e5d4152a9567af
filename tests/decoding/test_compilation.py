"""Weights in another order in memory: the same texts, by programs that are compiled for it."""

import jax
import numpy as np
import pytest
from helpers.models import TINY, random_model
from jax.experimental.layout import Format, Layout

from medusa_jax.checkpoints.weight_layout import for_decoding
from medusa_jax.decoding import compilation
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.serving.engine import Engine, run_jobs
from medusa_jax.serving.jobs import Job

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9]]


@pytest.fixture
def model():
    """A decoder with a tree, and parameters of its own that a test may give away."""
    random = random_model(TINY)
    tree = Tree.from_lists([[0], [1], [0, 0]])
    decoder = Decoder(TINY, drafter_of_heads(random.heads, tree), capacity=64)
    return decoder, jax.tree.map(lambda leaf: leaf + 0, for_decoding(random.params))


def _turned(leaf: jax.Array) -> Format:
    """The format of a matrix whose columns are contiguous; of all else its own."""
    layout = Layout(major_to_minor=(1, 0)) if leaf.ndim == 2 else leaf.format.layout
    return Format(layout, leaf.sharding)


def _texts(decoder: Decoder, params: dict) -> list[list[int]]:
    outputs = run_jobs(Engine(decoder, params, slots=2), [Job(prompt, 12) for prompt in PROMPTS])
    return [output.token_ids for output in outputs]


@pytest.mark.slow
def test_weights_move_once_and_texts_stay(monkeypatch, model):
    """A TPU is played: its compiler asks for columns, and each program takes them as they are."""
    decoder, params = model
    before, numbers = _texts(decoder, params), jax.tree.map(np.asarray, params)
    monkeypatch.setattr(compilation, "on_tpu", lambda params: True)
    monkeypatch.setattr(compilation, "TPU_OPTIONS", {})  # which a CPU's compiler does not know
    monkeypatch.setattr(
        compilation, "chosen_formats", lambda _, params, rows: jax.tree.map(_turned, params)
    )
    moved = compilation.in_fast_order(decoder, params, 2)
    weight = moved["backbone"]["layer_0"]["mlp"]["down"]["weight"].data
    assert weight.format.layout.major_to_minor == (1, 0)
    assert params["backbone"]["layer_0"]["mlp"]["down"]["weight"].data.is_deleted()
    assert not moved["backbone"]["final_norm"]["scale"].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, moved, numbers)
    assert _texts(decoder, moved) == before


@pytest.mark.slow
def test_the_compiler_is_asked(model):
    """Each parameter gets a format in which it can be put, also what the loop does not read."""
    decoder, params = model
    params["backbone"]["unread"] = jax.numpy.ones((3, 5))
    chosen = compilation.chosen_formats(decoder, params, 2)
    assert jax.tree.structure(chosen) == jax.tree.structure(params)
    put = jax.tree.map(jax.device_put, params, chosen)
    assert all(
        leaf.format.layout == wanted.layout
        for leaf, wanted in zip(jax.tree.leaves(put), jax.tree.leaves(chosen), strict=True)
    )


def test_a_cpu_does_not_care(model):
    decoder, params = model
    assert compilation.compiler_options(params) is None
    assert compilation.in_fast_order(decoder, params, 2) is params
