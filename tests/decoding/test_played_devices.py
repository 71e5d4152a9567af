"""GPUs and TPUs are played: their kernels, interpreted, decode the texts that XLA decodes."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.models import TINY, random_model
from helpers.played import play

from medusa_jax.checkpoints.weight_layout import for_decoding
from medusa_jax.decoding import network
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.model.config import ModelConfig
from medusa_jax.serving.engine import Engine, run_jobs
from medusa_jax.serving.jobs import Job

PROMPTS = [[1, 2, 3], [token % 40 for token in range(1, 61)], [5, 6, 7, 8, 9]]
# Of sizes that the kernel of few rows multiplies.
SIZES = {"vocab_size": 64, "hidden_size": 64, "ffn_size": 192, "head_dim": 16}
WIDE = dataclasses.replace(TINY, **SIZES, num_heads=6, num_kv_heads=1)
NORMS = {"qk_norm": True, "windows": (None, 3)}
PATHS = [[0], [1], [0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "config", "paths"),
    [
        ("gpu", WIDE, []),
        ("gpu", dataclasses.replace(WIDE, **NORMS), PATHS),
        ("tpu", dataclasses.replace(TINY, **NORMS), PATHS),
    ],
    ids=["gpu, plain", "gpu, tree", "tpu, tree"],
)
def test_texts_are_those_of_xla(
    monkeypatch: pytest.MonkeyPatch, platform: str, config: ModelConfig, paths: list
):
    """Of rows that come and go, whose prompts are read in blocks, and of a decoder's own prefill.

    Joint projections; on a GPU a cache of all layers, and products of few rows.
    """
    play(platform, monkeypatch.setattr)
    random = random_model(config)
    params = for_decoding(random.params, few_rows=False)
    drafter = drafter_of_heads(random.heads, Tree.from_lists(paths))
    # Not the decoder of another platform, whose programs are compiled.
    by_kernels = Decoder(config, drafter, capacity={"gpu": 125, "tpu": 124}[platform])
    by_xla = dataclasses.replace(by_kernels, kernels=())
    caches = [one.network.empty_cache(params, 1, 64) for one in (by_kernels, by_xla)]
    assert [cache.stacked for cache in caches] == [platform == "gpu", False]
    assert "query_key_value" in params["backbone"]["layer_0"]["attention"]

    def texts(decoder: Decoder) -> list[list[int]]:
        engine = Engine(decoder, params, slots=2)
        return [done.token_ids for done in run_jobs(engine, [Job(one, 12) for one in PROMPTS])]

    assert texts(by_kernels) == texts(by_xla)
    if not paths:  # the programs that a library's user calls
        states = [one.prefill(params, PROMPTS, max_new_tokens=9) for one in (by_kernels, by_xla)]
        ended = [
            one.generate(params, state)
            for one, state in zip((by_kernels, by_xla), states, strict=True)
        ]
        np.testing.assert_array_equal(*(state.sequence[:, :60] for state in ended))


def test_tokens_that_none_sees_are_added_behind():
    tokens, positions = np.array([[5, 7]]), np.array([[3, 4]])
    mask = np.array([[[1, 0], [1, 1]]], bool)
    more = network._with_more(*map(jax.numpy.asarray, (tokens, positions, mask)), 1)
    np.testing.assert_array_equal(more[0], [[5, 7, 7]])
    np.testing.assert_array_equal(more[1], [[3, 4, 4]])
    np.testing.assert_array_equal(more[2][0], [[1, 0, 0], [1, 1, 0], [1, 1, 0]])
