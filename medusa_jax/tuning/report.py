"""What `tune` measured, as a table and as a picture.

A row is of one tree: its name (`candidates.py`), its tokens, mean accepted length,
seconds a step, and predicted tokens per second.
"""

import re
from pathlib import Path
from typing import Any

from medusa_jax.files import writing
from medusa_jax.reports import pyplot, spread_cell, table


def line(row: dict[str, Any], plain: dict[str, Any]) -> str:
    """A row as it comes: "tree 6: 26.3 ms a step, 1.74 tokens a step, 66.2 tokens/s (1.38x)"."""
    ratio = row["tokens_per_second"] / plain["tokens_per_second"]
    return (
        f"tree {row['tree']}: {1e3 * row['step_seconds']:.2f} ms a step, "
        f"{row['mean_accepted_length']:.2f} tokens a step, "
        f"{row['tokens_per_second']:.1f} tokens/s ({ratio:.2f}x)"
    )


def markdown(rows: list[dict[str, Any]], best: dict[str, Any]) -> str:
    """The table, the best row marked."""
    plain = next(row for row in rows if row["nodes"] == 1)
    cells = []
    for row in rows:
        low, high = row["step_seconds_spread"]
        step = {"median": row["step_seconds"], "min": low, "max": high}
        cells.append(
            [
                f"{row['tree']}{' *' if row is best else ''}",
                spread_cell(step, "{:.2f}", scale=1e3),
                f"{row['mean_accepted_length']:.2f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['tokens_per_second'] / plain['tokens_per_second']:.2f}",
            ]
        )
    head = ["tree", "step ms (min to max)", "mean accepted length", "tokens/s", "ratio"]
    return table(head, cells)


def plot(rows: list[dict[str, Any]], best: dict[str, Any], path: Path) -> None:
    """Both curves over the size of the tree, and their product; nothing without matplotlib."""
    library = pyplot()
    if library is None:
        return
    series = (
        ("static", r"\d+", "o-"),
        ("grown", r"grow:\d+", "s--"),
        ("static, less deep", r"\d+:\d+", "o"),
        ("grown, less deep", r"grow:\d+:\d+", "s"),
    )
    figure, axes = library.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels = (
        ("mean_accepted_length", "mean accepted length", 1),
        ("step_seconds", "ms a step", 1e3),
        ("tokens_per_second", "tokens/s", 1),
    )
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        for name, names, mark in series:
            shown = [row for row in rows if re.fullmatch(names, row["tree"])]
            if shown:
                values = [scale * row[key] for row in shown]
                axis.plot([row["nodes"] for row in shown], values, mark, label=name, markersize=4)
        axis.axvline(best["nodes"], color="grey", linewidth=0.8)
        axis.set(xlabel="tokens in the tree", ylabel=label, ylim=(0, None))
    axes[0].legend(frameon=False)
    with writing(path):
        figure.savefig(path, dpi=120)
    library.close(figure)
