"""What reports of measurements share: Markdown tables, and the library that draws plots."""

import logging
from typing import Any

log = logging.getLogger(__name__)


def table(head: list[str], cells: list[list[str]]) -> str:
    """A Markdown table without the columns that hold nothing but dashes."""
    kept = [i for i in range(len(head)) if any(line[i] != "-" for line in cells)]
    head, *cells = ([line[i] for i in kept] for line in (head, *cells))
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread_cell(values: dict[str, float] | None, form: str, scale: float = 1) -> str:
    """Median, least and greatest: "2.5 (2.4 to 2.9)"; a dash for None."""
    if values is None:
        return "-"
    middle, low, high = (form.format(scale * values[key]) for key in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def number_cell(value: float | None, form: str) -> str:
    """A number, or a dash for None."""
    return "-" if value is None else form.format(value)


def pyplot() -> Any:
    """matplotlib's pyplot, which draws into files; None, with a warning, if it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        log.warning("no plots: matplotlib is not installed: pip install 'medusa_jax[bench]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
