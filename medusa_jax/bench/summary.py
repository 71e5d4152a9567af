"""From timed runs to the figures of a benchmark: rates, ratios, acceptance, machine.

Counters carry vLLM's names. They and the lengths are those of the first repeat,
since all repeats decode the same.
"""

import collections
import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from medusa_jax.bench.measure import PLAIN, Run, Task
from medusa_jax.bench.peers import PEERS
from medusa_jax.decoding.stats import Stats
from medusa_jax.distributed.hardware import cpu, device_bandwidth
from medusa_jax.drafting.drafter import Drafter, NoDraft
from medusa_jax.drafting.dynamic_tree import DynamicTree

OVERALL = "overall"

Group = tuple[str, str, str]  # acceptance, category, system


def summarise(
    tasks: Sequence[Task],
    runs: Sequence[Run],
    drafters: Mapping[str, Mapping[str, Drafter]],
    bandwidth: float,
) -> list[dict[str, Any]]:
    """One row an acceptance, category and system; "overall" is all categories together.

    Args:
      drafters: of each acceptance and system that has any.
      bandwidth: of a copy on this device, bytes a second.
    """
    groups: dict[Group, list[Run]] = collections.defaultdict(list)
    for run in runs:
        task = tasks[run.task]
        for category in dict.fromkeys((task.category, OVERALL)):
            groups[task.acceptance, category, run.system].append(run)
    rows = []
    for group in sorted(groups, key=_order(groups)):
        (acceptance, category, system), own = group, groups[group]
        plain = groups[acceptance, category, PLAIN]
        row: dict[str, Any] = dict(zip(("acceptance", "category", "system"), group, strict=True))
        row |= _speed(own, plain, bandwidth)
        first = [run for run in own if run.repeat == 0]
        if acceptance == "greedy" and system != PLAIN:
            row["same_texts"] = _same(first, plain)
        if any(run.lengths for run in first):
            lengths = [length for run in first for length in run.lengths]
            drafter = drafters[acceptance].get(system, NoDraft())
            grown = isinstance(getattr(drafter, "tree", None), DynamicTree)
            row |= {"tree_size": drafter.size, "tree_grown": grown}
            row |= counters(lengths, drafter.size, drafter.depth)
            row["accepted_share_per_pos"] = [
                count / len(lengths) for count in row["num_accepted_tokens_per_pos"]
            ]
        rows.append(row)
    return rows


def counters(lengths: Sequence[int], tree_size: int, depth: int) -> dict[str, Any]:
    """Acceptance from the tokens that each step accepted, the root included.

    Example: lengths (1, 3, 1, 2) of a tree two deep: 4 drafts, 3 accepted
    tokens, per position (2, 1), histogram (2, 1, 1), mean 7/4.
    """
    count = collections.Counter(lengths)
    return {
        "mean_accepted_length": sum(lengths) / len(lengths),
        "num_drafts": len(lengths),
        "num_draft_tokens": len(lengths) * (tree_size - 1),
        "num_accepted_tokens": sum(lengths) - len(lengths),
        "num_accepted_tokens_per_pos": [
            sum(length > position for length in lengths) for position in range(1, depth + 1)
        ],
        "accepted_length_histogram": [count[length] for length in range(1, depth + 2)],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def copy_bandwidth(size: int | None = None, tries: int = 5) -> float:
    """Bytes a second that this device reads and writes, the best of several passes over an array.

    In place: on a CPU a new array would be memory that the system hands out first, page by page.
    Elsewhere a try is ten passes, for a single pass is hardly longer than its start.

    Args:
      size: bytes of the array; default: 256 MB on a CPU, 4 GB elsewhere.
    """
    on_cpu = jax.default_backend() == "cpu"
    size, passes = size or (256 * 10**6 if on_cpu else 4 * 10**9), 1 if on_cpu else 10
    array = jnp.zeros(size // 4, jnp.float32)
    rewrite = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jax.block_until_ready(rewrite(array))
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        for _ in range(passes):
            array = rewrite(array)
        jax.block_until_ready(array)
        best = min(best, (time.perf_counter() - start) / passes)
    return 2 * array.nbytes / best


def about() -> dict[str, Any]:
    """Machine, versions, date and command line."""
    device = jax.devices()[0]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": shlex.join(sys.argv),
        "device": device.device_kind,
        "platform": device.platform,
        "datasheet_bandwidth": device_bandwidth(),
        "cpu": cpu(),
        "cpu_count": os.cpu_count(),
        "machine": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("jax", "torch", "transformers", "medusa_jax")},
    }


def _speed(runs: Sequence[Run], plain: Sequence[Run], bandwidth: float) -> dict[str, Any]:
    """Sums within each repeat, then spreads over the repeats."""
    ours, theirs = _by_repeat(runs), _by_repeat(plain)
    first = [run for run in runs if run.repeat == 0]
    texts = sum(len(run.texts) for run in first)
    row: dict[str, Any] = {
        "texts": texts,
        "tokens": sum(run.stats.tokens for run in first),
        "tokens_per_second": spread([stats.tokens_per_second for stats in ours]),
        "speedup": spread(
            [a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, theirs, strict=True)]
        ),
        "time_to_first_token_seconds": spread(
            [(stats.seconds - stats.decode_seconds) / texts for stats in ours]
        ),
    }
    if all(stats.passes for stats in ours):
        steps = [stats.decode_seconds / stats.passes for stats in ours]
        base = [stats.decode_seconds / stats.passes for stats in theirs]
        rates = [stats.bytes / stats.decode_seconds for stats in ours]
        row["step_seconds"] = spread(steps)
        row["step_overhead"] = spread([a / b for a, b in zip(steps, base, strict=True)])
        row["bandwidth_share"] = spread([rate / bandwidth for rate in rates])
        if peak := device_bandwidth():
            row["bandwidth_share_datasheet"] = spread([rate / peak for rate in rates])
    return row


def _order(groups: Iterable[Group]) -> Callable[[Group], tuple[int, bool, int, int]]:
    """Acceptances and categories as they came, "overall" last; plain first, peers last."""
    acceptances, categories, names = (
        list(dict.fromkeys(names)) for names in zip(*groups, strict=True)
    )
    names.sort(key=lambda name: (name != PLAIN, [*PEERS].index(name) + 1 if name in PEERS else 0))
    return lambda group: (
        acceptances.index(group[0]),
        group[1] == OVERALL,
        categories.index(group[1]),
        names.index(group[2]),
    )


def _by_repeat(runs: Sequence[Run]) -> list[Stats]:
    """The stats of each repeat, summed."""
    sums: dict[int, Stats] = collections.defaultdict(Stats)
    for run in runs:
        sums[run.repeat] += run.stats
    return [sums[repeat] for repeat in sorted(sums)]


def _same(runs: Sequence[Run], plain: Sequence[Run]) -> dict[str, int]:
    """How many texts plain decoding wrote too."""
    expected = {run.task: run.texts for run in plain if run.repeat == 0}
    pairs = [pair for run in runs for pair in zip(run.texts, expected[run.task], strict=True)]
    return {"same": sum(a == b for a, b in pairs), "of": len(pairs)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
