"""A tree for a machine that nobody tuned on: another machine's tuning, with steps timed here.

How much a tree accepts does not depend on the machine. How long its step takes does: so a few
trees are timed, once, and the times between them are interpolated. `medusa_jax.tune` measures
all trees, and for longer.
"""

import dataclasses
import logging
import time
from typing import Any

import jax
import numpy as np

from medusa_jax.checkpoints.load import Model
from medusa_jax.decoding.acceptance import Acceptance
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.prompt_blocks import RowSettings
from medusa_jax.decoding.state import RUNNING, State
from medusa_jax.distributed.rules import everywhere
from medusa_jax.drafting.drafter import Params
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.files import OutputError
from medusa_jax.progress import say
from medusa_jax.serving import tree_store
from medusa_jax.serving.programs import Programs, fitting

log = logging.getLogger(__name__)

SIZES = (6, 16)  # of the trees that are timed, beside the root alone
ROUNDS, STEPS = 6, 6  # in which they take turns, and steps of each turn
TOKENS = 5  # of room for a step: random texts accept fewer
GAIN = 1.05  # a tree that promises less than that is not worth its risk

Trees = list[tuple[Tree | DynamicTree, float]]  # and the mean accepted length of each


def auto_tree(
    model: Model, acceptance: Acceptance, batch_size: int, dtype: str, *, own_heads: bool = True
) -> Tree | DynamicTree | None:
    """The tree of `--tree auto`: tuned here, or chosen by times measured here; None if unknown.

    Args:
      own_heads: see `tree_store.find`.

    Raises:
      InputError: a file of tunings is broken, or for other heads.
    """
    found = tree_store.find(model, acceptance, batch_size, dtype, own_heads=own_heads)
    if found is None:
        return None
    trees = tree_store.accepted_lengths(found.tuning)
    if found.here or model.mesh or not trees:  # processes of a mesh must agree
        return tree_store.tree_of(found.tuning)
    where = found.tuning.get("device", "an unknown device")
    say(f"no tree was tuned for this machine, only for {where}: timing a few trees here, once")
    probes = probed(trees)
    seconds = step_seconds(model, acceptance, batch_size, [tree for tree, _ in probes])
    if not np.isfinite(seconds).all():
        return tree_store.tree_of(found.tuning)
    rows = predicted(trees, [tree.size for tree, _ in probes], seconds)
    best = max(rows, key=lambda row: row["tokens_per_second"] / (1 if row["nodes"] == 1 else GAIN))
    tuning = {
        "acceptance": tree_store.describe(acceptance),
        "batch_size": batch_size,
        **tree_store.conditions(model, dtype),
        "backend": jax.default_backend(),
        "quick": True,
        "date": time.strftime("%Y-%m-%d"),
        "tree": best["shape"],
        "best": best,
        "table": rows,
    }
    try:
        tree_store.save(tree_store.cache_file(model, dtype), tuning)
    except OutputError as error:
        log.warning("the tree will be chosen anew at each start: %s", error)
    return tree_store.tree_of(tuning)


def probed(trees: Trees) -> Trees:
    """The root alone and the trees nearest to `SIZES`, which accept most of their size."""
    ordered = sorted(trees, key=lambda one: -one[1])
    nearest = [min(ordered, key=lambda one: abs(one[0].size - size)) for size in SIZES]
    by_size = {tree.size: (tree, length) for tree, length in [(Tree(), 1.0), *nearest]}
    return [by_size[size] for size in sorted(by_size)]


def step_seconds(
    model: Model, acceptance: Acceptance, batch_size: int, trees: list[Tree | DynamicTree]
) -> list[float]:
    """The least time of a step with each tree, over rounds in which they take turns."""
    batches = []
    for tree in trees:
        drafter = drafter_of_heads(model.heads, tree)
        decoder = fitting(Decoder(model.config, drafter, acceptance), ROUNDS * STEPS * TOKENS)
        state = empty_state(decoder, model.params, batch_size)
        run = Programs(model.parameters, drafter).run(decoder, state)
        state, _ = run(model.params, state, np.int32(1), np.int32(1))
        batches.append((run, state))
    times: list[list[float]] = [[] for _ in trees]
    for _ in range(ROUNDS):
        for number, (run, state) in enumerate(batches):
            start = time.perf_counter()
            state, steps = run(model.params, state, np.int32(STEPS), np.int32(1))
            if int(steps):
                times[number].append((time.perf_counter() - start) / int(steps))
            batches[number] = run, state
    return [min(seconds, default=np.inf) for seconds in times]  # a row that failed takes no step


def empty_state(decoder: Decoder, params: Params, batch_size: int, tokens: int = 0) -> State:
    """Rows that have no prompt and go on to the end: no prompt must be read for them.

    Args:
      tokens: that the cache of each is said to hold; a step reads so many.
    """
    state = decoder.empty(params, batch_size, RowSettings())
    limit, length = (np.full(batch_size, value, np.int32) for value in (decoder.capacity, tokens))
    rows = limit, length, np.full(batch_size, RUNNING, np.int32)
    limit, length, finish = everywhere(rows, decoder.mesh)
    cache = dataclasses.replace(state.cache, length=length)
    return dataclasses.replace(state, cache=cache, limit=limit, finish=finish)


def predicted(trees: Trees, sizes: list[int], seconds: list[float]) -> list[dict[str, Any]]:
    """A row a tree that is no larger than the largest probe: its step and its tokens per second.

    Probes of 1 and 5 tokens that take 1 and 3 s say 2 s for a tree of 3 tokens.
    """
    rows = []
    for tree, length in [(Tree(), 1.0), *trees]:
        if tree.size <= max(sizes):
            step = float(np.interp(tree.size, sizes, seconds))
            row = {"nodes": tree.size, "step_seconds": step, "mean_accepted_length": length}
            row |= {"step_over_plain": step / seconds[0], "tokens_per_second": length / step}
            rows.append(row | {"shape": tree_store.shape(tree)})
    return rows
