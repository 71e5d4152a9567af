"""The backbone against Hugging Face's models; blocks after a cache; the pieces it is made of."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers.models import TINY, random_model
from helpers.tiers import slow_except

from medusa_jax.checkpoints.load import load_model
from medusa_jax.kernels.heads import Heads
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.kv_cache import Block, KVCache, commit, init_cache, write_block
from medusa_jax.model.layers import within_window

BASE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
# Of eight frequencies, one turns often enough to stay, two are on the ramp, five are stretched.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
NO_WINDOW = {"windows": (None, None, None)}
NO_SCALING = {"rope_scaling": None}

# name: (family, settings, tokens, fields without which the result must be wrong)
MODELS: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "llama": ("llama", {}, 24, {"rope_theta": 9000.0}),
    "llama, one key head a query head": (
        "llama",
        {"num_key_value_heads": 4, "rms_norm_eps": 0.1},
        24,
        {"norm_eps": 1e-6},
    ),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}, 24, {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}, 24, {}),
    "llama, attention bias": ("llama", {"attention_bias": True}, 24, {}),
    "llama, head_dim": ("llama", {"head_dim": 16}, 24, {}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}, 48, NO_SCALING),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR}, 24, NO_SCALING),
    "llama, dynamic rope": (
        "llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 16, "head_dim": 16},
        48,
        NO_SCALING,
    ),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}, 48, NO_SCALING),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 6}, 24, {}),
    "mistral, window": ("mistral", {"sliding_window": 8}, 24, NO_WINDOW),
    "mistral, window, rope theta": (
        "mistral",
        {"sliding_window": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        24,
        {"windows": (6, 6, 6)},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, 24, {}),
    "qwen2, window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        24,
        {"windows": (6, 6, 6)},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}, 24, {}),
    "qwen3, bias, window": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        24,
        NO_WINDOW,
    ),
}


def reference(family: str, settings: dict[str, Any]) -> transformers.PreTrainedModel:
    """A Hugging Face model whose every weight is random: norms and biases, too."""
    config = transformers.AutoConfig.for_model(family, **BASE | settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 2:
                weight.copy_(2 * noise / weight.shape[1] ** 0.5)
            else:
                weight.copy_(noise / 2 + (0 if name.endswith("bias") else 1))
    return model.eval()


@functools.partial(jax.jit, static_argnames=("config", "method"))
def apply(config: ModelConfig, params: dict[str, Any], *inputs: Any, method: str | None = None):
    return Backbone(config).apply({"params": params}, *inputs, method=method)


def run_whole(config: ModelConfig, params: dict[str, Any], tokens: np.ndarray) -> jax.Array:
    """Hidden states of whole sequences from their first token on."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask, lengths = causal_mask(tokens.shape[1]), jnp.full(tokens.shape[0], tokens.shape[1])
    return apply(config, params, jnp.asarray(tokens), positions, mask, None, lengths)[0]


def logits_of(config: ModelConfig, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    hidden = run_whole(config, params, tokens)
    return np.asarray(apply(config, params, hidden, method="unembed"))


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


FAST = [MODELS[name] for name in ("llama", "mistral, window, rope theta", "qwen3, bias, window")]


@pytest.mark.parametrize(
    ("family", "settings", "length", "without"),
    slow_except(MODELS.values(), *FAST),
    ids=list(MODELS),
)
def test_logits_equal_hugging_face(
    family: str,
    settings: dict[str, Any],
    length: int,
    without: dict[str, Any],
    tmp_path: Path,
):
    model = reference(family, settings)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = np.random.default_rng(1).integers(0, BASE["vocab_size"], (2, length))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    params = ours.params["backbone"]
    assert distance(logits_of(ours.config, params, tokens), theirs) < 1e-4
    if without:  # what is tested here is big enough to be seen
        other = dataclasses.replace(ours.config, **without)
        assert distance(logits_of(other, params, tokens), theirs) > 1e-2


WINDOWED = dataclasses.replace(TINY, windows=(4, None))


@pytest.mark.slow
@pytest.mark.parametrize("config", [TINY, WINDOWED], ids=["full", "window"])
def test_a_block_after_the_cache_equals_one_block(config: ModelConfig):
    params = random_model(config).params["backbone"]
    lengths, new, capacity = np.array([9, 6]), 5, 16
    rows = np.arange(2)[:, None]
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, capacity))

    def run(positions: np.ndarray, *cache: KVCache) -> tuple[jax.Array, Block]:
        block, mask = jnp.asarray(tokens[rows, positions]), causal_mask(positions.shape[1])
        return apply(config, params, block, jnp.asarray(positions), mask, *cache)

    first = np.broadcast_to(np.arange(lengths.max()), (2, 9))  # row 1 is padded on the right
    head, block = run(first)
    cache = init_cache(config, 2, capacity, jnp.float32)
    # Would show if it were read.
    keys, values = jax.tree.map(lambda slots: slots + 1e3, (cache.keys, cache.values))
    cache = dataclasses.replace(cache, keys=keys, values=values, length=jnp.asarray(lengths))
    cache = write_block(cache, block, 0)
    second = lengths[:, None] + np.arange(new)
    tail, _ = run(second, cache)

    whole = run_whole(config, params, tokens)
    assert distance(tail, whole[rows, second]) < 1e-5
    for row, length in enumerate(lengths):
        assert distance(head[row, :length], whole[row, :length]) < 1e-5


@pytest.mark.slow
def test_a_window_forgets():
    """One layer with window 4: token 0 reaches hidden states 0 to 3 and no others."""
    config = dataclasses.replace(TINY, num_layers=1, windows=(4,))
    params = random_model(config).params["backbone"]
    tokens = np.arange(10)[None]
    first, second = (
        run_whole(config, params, other)[0] for other in (tokens, np.where(tokens, tokens, 39))
    )
    changed = np.abs(first - second).max(axis=-1) > 1e-6
    np.testing.assert_array_equal(changed, [True] * 4 + [False] * 6)


def test_within_window_example():
    query, keys = jnp.asarray([[5]]), jnp.asarray([[3, 4, 5]])
    np.testing.assert_array_equal(within_window(query, keys, 2), [[[False, True, True]]])
    np.testing.assert_array_equal(within_window(query, keys, None), [[[True, True, True]]])


def test_causal_mask_example():
    np.testing.assert_array_equal(causal_mask(3), [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]])


# One layer, B = K = 1; each node's keys are its number, its values that plus 100.
ONE_LAYER = dataclasses.replace(TINY, num_layers=1, windows=(), num_heads=1, num_kv_heads=1)


def numbered_block(batch: int, nodes: int) -> Block:
    """Keys and values side by side in an array, and angles of 0."""
    row = jnp.arange(nodes, dtype=jnp.float32)[None, :, None]
    width = ONE_LAYER.head_dim
    numbers = jnp.broadcast_to(row, (batch, nodes, width))
    both = jnp.concatenate((numbers, numbers + 100), axis=2)
    cos = jnp.ones((batch, nodes, width // 2))
    return Block((Heads(both, width, 0, 1),), (Heads(both, width, 1, 1),), (cos, 0 * cos))


def slots_of(cache: Any) -> tuple[np.ndarray, np.ndarray]:
    """The number in each slot of the keys, and of the values [B, S]; each slot holds one number."""
    (keys,), (values,) = cache.keys, cache.values
    keys = keys.swapaxes(2, 3)
    for slots in (keys, values):
        np.testing.assert_array_equal(slots.min(axis=-1), slots.max(axis=-1))
    return np.asarray(keys[:, 0, :, 0]), np.asarray(values[:, 0, :, 0])


@pytest.mark.slow
def test_commit_example():
    """A row of length 7 takes nodes 0, 2, 5 with count 2; another of length 2 takes 0, 1, 3."""
    cache = init_cache(ONE_LAYER, 2, 12, jnp.float32)
    cache = dataclasses.replace(
        cache,
        keys=(cache.keys[0] - 1,),
        values=(cache.values[0] - 1,),
        length=jnp.asarray([7, 2]),
    )
    path = jnp.asarray([[0, 2, 5], [0, 1, 3]])
    after = commit(cache, numbered_block(2, 6), path, jnp.asarray([2, 3]))
    np.testing.assert_array_equal(after.length, [9, 5])
    keys, values = slots_of(after)
    np.testing.assert_array_equal(keys[0], [-1] * 7 + [0, 2, 5] + [-1] * 2)
    np.testing.assert_array_equal(keys[1], [-1] * 2 + [0, 1, 3] + [-1] * 7)
    np.testing.assert_array_equal(values, np.where(keys < 0, -1, keys + 100))


@pytest.mark.slow
def test_a_single_row_takes_what_it_takes_in_a_batch():
    """By a plain update of slots, which reads no old slot, and not by a scatter."""
    cache = init_cache(ONE_LAYER, 2, 8, jnp.float32)
    cache = dataclasses.replace(cache, length=jnp.asarray([2, 5]))
    path, count = jnp.asarray([[0, 2, 3], [0, 1, 3]]), jnp.asarray([2, 3])
    inputs = cache, numbered_block(2, 4), path, count
    alone = jax.tree.map(lambda leaf: leaf[:1], inputs)
    wanted = jax.tree.map(lambda leaf: leaf[:1], jax.jit(commit)(*inputs))
    for got, other in zip(
        jax.tree.leaves(jax.jit(commit)(*alone)), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_array_equal(got, other)
    assert "scatter" not in str(jax.make_jaxpr(commit)(*alone))
    assert "scatter" in str(jax.make_jaxpr(commit)(*inputs))


def test_path_of_a_block_example():
    tokens = jnp.asarray([[5, 6, 7]])[..., None]
    heads = Heads(jnp.concatenate((tokens, tokens + 100), axis=2), 1, 0, 1)
    block = Block((heads,), (dataclasses.replace(heads, first=1),), (tokens + 0.0, tokens + 0.0))
    taken = block.on_path(jnp.asarray([[0, 2]]))
    assert taken.keys[0].alone().tolist() == [[[[5]], [[7]]]]
    assert taken.values[0].alone().tolist() == [[[[105]], [[107]]]]
    assert taken.rope[0].tolist() == [[[5], [7]]]
    assert block.begin(2).values[0].alone().tolist() == [[[[105]], [[106]]]]


def test_a_block_of_all_layers_is_turned_as_each_layer_is():
    rng, (rows, layers, tokens, heads, width) = np.random.default_rng(5), (2, 3, 4, 2, 8)
    joint = jnp.asarray(rng.normal(size=(rows, layers, tokens, 4 * heads * width)))
    rope = tuple(jnp.asarray(rng.normal(size=(rows, tokens, width // 2))) for _ in range(2))
    together = Heads(joint, width, 2 * heads, heads), Heads(joint, width, 3 * heads, heads)
    apart = jax.tree.map(lambda one: tuple(one[:, i] for i in range(layers)), joint)
    of_layers = (
        tuple(Heads(one, width, first * heads, heads) for one in apart) for first in (2, 3)
    )
    path = jnp.asarray([[0, 3], [2, 1]])
    keys, values = Block(*together, rope).on_path(path).turned()
    each_keys, each_values = Block(*of_layers, rope).on_path(path).turned()
    assert keys.shape == (rows, layers, heads, width, 2)
    np.testing.assert_array_equal(keys, jnp.stack(each_keys, 1))
    np.testing.assert_array_equal(values, jnp.stack(each_values, 1))


def test_write_block_leaves_lengths_and_other_slots():
    cache = init_cache(ONE_LAYER, 2, 6, jnp.bfloat16)
    cache = dataclasses.replace(cache, length=jnp.asarray([4, 1]))
    after = write_block(cache, numbered_block(2, 3), 2)
    np.testing.assert_array_equal(after.length, [4, 1])
    keys, values = slots_of(after)
    np.testing.assert_array_equal(keys, [[0, 0, 0, 1, 2, 0]] * 2)
    np.testing.assert_array_equal(values, [[0, 0, 100, 101, 102, 0]] * 2)
    assert (after.keys[0].dtype, after.capacity) == (jnp.bfloat16, 6)
