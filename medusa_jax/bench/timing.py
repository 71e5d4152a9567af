"""The time of a step over the size of its tree, and of a prefill, on token ids that mean nothing.

The time depends on shapes alone, so weights may be random.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from medusa_jax.bench.summary import spread
from medusa_jax.decoding.compilation import compile_run, in_fast_order
from medusa_jax.decoding.decoder import SLOTS_MULTIPLE, Decoder
from medusa_jax.decoding.prefill import round_up
from medusa_jax.decoding.stats import step_bytes
from medusa_jax.distributed.hardware import device_bandwidth
from medusa_jax.drafting.drafter import Params
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.kernel_choice import KERNELS

TREE = "mc_sim_7b_63"
PROMPT_TOKENS = 16


def trees(sizes: Sequence[int], num_heads: int) -> list[Tree]:
    """The root alone, for plain decoding, then the published tree cut to each size, once each."""
    whole = Tree.published(TREE).limit_depth(num_heads)
    cuts = dict.fromkeys(map(whole.cut, sorted({*sizes} - {1})))
    return [Tree(), *(tree for tree in cuts if tree.nodes)]


def room(
    config: ModelConfig, depth: int, steps: int, max_length: int | None = None
) -> tuple[int, int]:
    """Capacity of the decoders, and steps of a timing: as many as asked for, if they fit.

    A step may accept depth + 1 tokens, and no row shall end before its last step. Without
    `max_length` there are hardly more cache slots than that, the same for each tree: 32
    steps of depth 4 after 16 prompt tokens need 176 tokens, and get 251, in 256 slots.
    """
    longest = PROMPT_TOKENS + steps * (depth + 1)
    capacity = max_length or round_up(longest + depth + 1, SLOTS_MULTIPLE) - depth - 1
    capacity = capacity if max_length else min(capacity, config.context)
    steps = min(steps, (capacity - PROMPT_TOKENS) // (depth + 1))
    if steps < 1:
        raise InputError(
            f"{capacity} tokens are too few for a prompt of {PROMPT_TOKENS} and a step that may "
            f"accept {depth + 1}"
        )
    return capacity, steps


def time_steps(
    config: ModelConfig,
    heads: HeadsConfig,
    params: Params,
    *,
    sizes: Sequence[int],
    batch_sizes: Sequence[int],
    steps: int,
    repeats: int,
    copy_bandwidth: float,
    max_length: int | None = None,
    mesh: Mesh | None = None,
    kernels: tuple[str, ...] = KERNELS,
    tick: Callable[[], object] = lambda: None,
    over: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """A row for each batch size and tree: ms a step, its ratio to the plain step, bandwidth.

    Sizes and batch sizes take turns, in an order that rotates from repeat to repeat, so that
    a machine whose speed drifts slows all alike. Ratios are taken within a repeat.

    Args:
      steps: of one timing, if they fit.
      copy_bandwidth: measured on this device, bytes a second.
      max_length: cache capacity in tokens, of which attention reads what is filled. See `room`.
      mesh: the devices that the parameters are split over.
      kernels: as of a `Decoder`.
      tick: called after each of the (repeats + 1) x batch sizes x trees runs; the first compile.
      over: whether the time is over, so that no further repeat begins after the first.

    Raises:
      InputError: `max_length` is too short, or exceeds the model's context.
    """
    chosen = trees(sizes, heads.num_heads)
    capacity, steps = room(config, chosen[-1].depth, steps, max_length)
    how: dict[str, Any] = {"capacity": capacity, "mesh": mesh, "kernels": kernels}
    decoders = {tree.size: Decoder(config, drafter_of_heads(heads, tree), **how) for tree in chosen}
    params = in_fast_order(decoders[chosen[-1].size], params, max(batch_sizes))
    cases = list(itertools.product(dict.fromkeys(batch_sizes), decoders))
    times: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    programs: dict[Any, Any] = {}
    for repeat, (batch, size) in _turns(cases, repeats, over):
        seconds = _step_seconds(decoders[size], params, batch, steps, programs)
        if repeat:
            times[batch, size].append(seconds)
        tick()
    return [
        {"batch_size": batch, "nodes": size, "depth": decoders[size].drafter.depth}
        | {"repeats": len(times[batch, size])}
        | _figures(
            times[batch, size],
            times[batch, 1],
            step_bytes(decoders[size], params, batch * (PROMPT_TOKENS + steps / 2)),
            copy_bandwidth,
        )
        for batch, size in cases
    ]


def _turns(
    cases: list[tuple[int, int]], repeats: int, over: Callable[[], bool]
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Repeats and cases, each of which leads in its turn; repeat 0 is one more than asked for."""
    for repeat in range(repeats + 1):
        if repeat > 1 and over():
            return
        shift = repeat % len(cases)
        for case in cases[shift:] + cases[:shift]:
            yield repeat, case


def time_prefill(
    config: ModelConfig,
    heads: HeadsConfig,
    params: Params,
    *,
    prompt_tokens: int,
    batch_sizes: Sequence[int],
    repeats: int,
) -> list[dict[str, Any]]:
    """A row for each batch size: ms until the prompts are read and the first guesses are made."""
    tree = trees((config.vocab_size,), heads.num_heads)[-1]
    decoder = Decoder(config, drafter_of_heads(heads, tree), capacity=prompt_tokens + 1)
    rows = []
    for batch in batch_sizes:
        prompts, times = [_prompt(config, prompt_tokens)] * batch, []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            jax.block_until_ready(decoder.prefill(params, prompts, max_new_tokens=1))
            times.append(1e3 * (time.perf_counter() - start))
        rows.append({"batch_size": batch, "tokens": prompt_tokens, "ms": spread(times[1:])})
    return rows


def _prompt(config: ModelConfig, length: int) -> list[int]:
    return [1 + token % (config.vocab_size - 1) for token in range(length)]


def _step_seconds(
    decoder: Decoder, params: Params, batch: int, steps: int, programs: dict[Any, Any]
) -> float:
    """Seconds of one of `steps` steps, all of which run in one device loop.

    Args:
      programs: compiled so far, by size of the tree and of the batch; a missing one is added.
    """
    prompts = [_prompt(decoder.config, PROMPT_TOKENS)] * batch
    new_tokens = steps * (decoder.drafter.depth + 1)
    state = jax.block_until_ready(decoder.prefill(params, prompts, max_new_tokens=new_tokens))
    case = decoder.drafter.size, batch
    if case not in programs:
        programs[case] = compile_run(decoder, params, state)
    run = programs[case]
    start = time.perf_counter()
    _, taken = jax.block_until_ready(run(params, state, np.int32(steps), np.int32(1)))
    return (time.perf_counter() - start) / int(taken)


def _figures(
    seconds: list[float], plain: list[float], read: float, copy_bandwidth: float
) -> dict[str, Any]:
    """Spreads over the repeats of a step's time, that reads so many bytes."""
    figures = {
        "step_ms": spread([1e3 * value for value in seconds]),
        "step_overhead": spread([a / b for a, b in zip(seconds, plain, strict=True)]),
        "bandwidth_share": spread([read / value / copy_bandwidth for value in seconds]),
    }
    if peak := device_bandwidth():
        figures["bandwidth_share_datasheet"] = spread([read / value / peak for value in seconds])
    return figures
