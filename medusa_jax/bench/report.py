"""What `bench` measured, as a Markdown table and as plots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medusa_jax.bench.measure import MEDUSA, PLAIN
from medusa_jax.bench.summary import OVERALL
from medusa_jax.reports import number_cell, pyplot, spread_cell, table

Row = dict[str, Any]
Report = dict[str, Any]

LABELS = {
    "plain": "plain",
    "medusa": "Medusa",
    "hf": "HF generate",
    "hf_lookup": "HF prompt lookup",
}
BANDWIDTH = (
    "Bandwidth: what steps must read, over what a copy on this device moves; more than 100% where "
    "the model stays in the caches."
)
DRAFTING = (
    "Drafting: how much longer a step takes than a plain step (medians), which drafts nothing and "
    "verifies a single token."
)
NO_ACCEPTANCE = (
    "Weights and heads are random: acceptance is not measured, and steps are timed, not texts."
)


def label(system: str) -> str:
    """What a reader calls a system; drafters have the name that was asked for."""
    return LABELS.get(system, system)


def markdown(report: Report) -> str:
    """Head, tables and notes."""
    parts = [_head(report)]
    if report["kind"] != "prompts":
        notes = [report["note"]] if report["note"] else []
        parts += [*notes, steps_table(report["rows"]), BANDWIDTH]
    else:
        acceptances = dict.fromkeys(row["acceptance"] for row in report["rows"])
        parts += [part for one in acceptances for part in _acceptance(report, one)]
        if report.get("drafters"):
            parts += [drafters_table(report["rows"]), DRAFTING]
        parts.append(
            "Medians over the repeats, with the least and the greatest. Speedup: tokens/s over "
            "our plain decoding in the same repeat. Accepted by depth: in how many steps a guess "
            "of depth 1, 2, ... was accepted. Step: time of a step over a plain step. " + BANDWIDTH
        )
    return "\n\n".join(parts)


def plots(report: Report, directory: Path) -> list[str]:
    """Draws PNG files into the directory; returns their names."""
    library = pyplot()
    if library is None:
        return []
    draw: dict[str, Callable[[Report, Any], bool]]
    if report["kind"] != "prompts":
        draw = {"steps.png": _draw_steps}
    else:
        draw = {"speed.png": _draw_speed, "acceptance.png": _draw_acceptance}
    written = []
    for name, paint in draw.items():
        figure = library.figure(figsize=(9, 4.5), layout="constrained")
        if paint(report, figure):
            figure.savefig(directory / name, dpi=120)
            written.append(name)
        library.close(figure)
    return written


# --- tables -----------------------------------------------------------------------------------


def _head(report: Report) -> str:
    device = report["device"] if report["platform"] != "cpu" else report["cpu"]
    what = report.get("preset") or report["model"]
    peak = report["datasheet_bandwidth"]
    return (
        f"{what}, {report['dtype']}, {device} ({report['cpu_count']} processors), "
        f"jax {report['jax']}, {_torch(report)}{report['date']}; "
        f"copy bandwidth {report['copy_bandwidth'] / 1e9:.1f} GB/s"
        + (f" of {peak / 1e9:.0f} by the data sheet" if peak else "")
        + f"; {report['repeats']} repeats"
    )


def _torch(report: Report) -> str:
    threads = report.get("torch_threads")
    return f"torch {report['torch']} with {threads} threads, " if threads else ""


def _acceptance(report: Report, acceptance: str) -> list[str]:
    """Heading, table and notes of one acceptance."""
    rows = _rows(report, acceptance)
    cells = [
        [
            row["category"],
            label(row["system"]),
            spread_cell(row["tokens_per_second"], "{:.1f}"),
            spread_cell(row["speedup"], "{:.2f}x"),
            number_cell(row.get("mean_accepted_length"), "{:.2f}"),
            " ".join(f"{share:.0%}" for share in row.get("accepted_share_per_pos", ())) or "-",
            spread_cell(row.get("step_overhead"), "{:.2f}x"),
            spread_cell(row["time_to_first_token_seconds"], "{:.1f}", scale=1e3),
            spread_cell(row.get("bandwidth_share"), "{:.0%}"),
        ]
        for row in rows
    ]
    head = [
        "category", "system", "tokens/s", "speedup", "accepted length", "accepted by depth", "step",
        "first token ms", "bandwidth",
    ]  # fmt: skip
    parts = [
        f"### {report['schemes'][acceptance]}{_tree(rows)}, "
        f"batch {report['batch_size']}, {report['max_new_tokens']} new tokens",
        table(head, cells),
    ]
    same = [
        f"{label(row['system'])} {row['same_texts']['same']} of {row['same_texts']['of']}"
        for row in report["rows"]
        if (row["acceptance"], row["category"]) == (acceptance, OVERALL) and "same_texts" in row
    ]
    return [*parts, f"Texts equal to plain decoding's: {', '.join(same)}."] if same else parts


def drafters_table(rows: list[Row]) -> str:
    """The drafters beside each other, over all prompts: tokens a step, its cost, and speed."""
    overall = [row for row in rows if row["category"] == OVERALL and "tree_size" in row]
    plain = {row["acceptance"]: row for row in overall if row["system"] == PLAIN}
    cells = []
    for row in overall:
        step, base = (one["step_seconds"]["median"] for one in (row, plain[row["acceptance"]]))
        cells.append(
            [
                row["acceptance"],
                label(row["system"]),
                str(row["tree_size"]),
                f"{row['mean_accepted_length']:.2f}",
                spread_cell(row["step_seconds"], "{:.2f}", scale=1e3),
                f"{1e3 * (step - base):.2f}",
                spread_cell(row["tokens_per_second"], "{:.1f}"),
                spread_cell(row["speedup"], "{:.2f}x"),
            ]
        )
    head = ["acceptance", "drafter", "tokens verified", "tokens a step", "ms a step"]
    return table([*head, "drafting, ms", "tokens/s", "speedup"], cells)


def steps_table(rows: list[Row]) -> str:
    """Time of a step by batch and tree."""
    cells = [
        [
            str(row["batch_size"]),
            str(row["nodes"]) if row["depth"] else "1 (plain)",
            spread_cell(row["step_ms"], "{:.2f}"),
            spread_cell(row["step_overhead"], "{:.2f}x"),
            spread_cell(row["bandwidth_share"], "{:.0%}"),
            spread_cell(row.get("bandwidth_share_datasheet"), "{:.0%}"),
        ]
        for row in rows
    ]
    head = ["batch", "tree", "ms a step", "over plain", "of copy bandwidth", "of data sheet"]
    return table(head, cells)


def _tree(rows: list[Row]) -> str:
    row = next((row for row in rows if row["system"] == MEDUSA), None)
    if row is None:
        return ""
    return f", {'grown ' if row['tree_grown'] else ''}tree of {row['tree_size']} tokens"


def _rows(report: Report, acceptance: str) -> list[Row]:
    """Rows of one acceptance; where there is one category only, without the sum of all."""
    rows = [row for row in report["rows"] if row["acceptance"] == acceptance]
    if len({row["category"] for row in rows}) == 2:
        return [row for row in rows if row["category"] != OVERALL]
    return rows


# --- plots ------------------------------------------------------------------------------------


def _draw_speed(report: Report, figure: Any) -> bool:
    """tokens/s by category and system, a panel for each acceptance."""
    acceptances = list(dict.fromkeys(row["acceptance"] for row in report["rows"]))
    panels = figure.subplots(1, len(acceptances), sharey=True, squeeze=False)[0]
    for acceptance, axes in zip(acceptances, panels, strict=True):
        rows = _rows(report, acceptance)
        categories = list(dict.fromkeys(row["category"] for row in rows))
        systems = list(dict.fromkeys(row["system"] for row in rows))
        width = 0.8 / len(systems)
        for place, system in enumerate(systems):
            speeds = {r["category"]: r["tokens_per_second"] for r in rows if r["system"] == system}
            left = (place - (len(systems) - 1) / 2) * width
            axes.bar(
                [left + i for i in range(len(categories))],
                [speeds[category]["median"] for category in categories],
                width,
                yerr=_error_bars([speeds[category] for category in categories]),
                label=Path(label(system)).name,
            )
        axes.set_xticks(range(len(categories)), categories, rotation=30, ha="right")
        axes.set_title(acceptance)
    panels[0].set_ylabel("tokens/s")
    labels = (axes.get_legend_handles_labels() for axes in panels)
    most = max(labels, key=lambda handles_and_names: len(handles_and_names[1]))
    figure.legend(*most, loc="outside upper center", ncols=len(most[1]))
    return True


def _draw_acceptance(report: Report, figure: Any) -> bool:
    """How often a step accepts at least k guesses: of each acceptance, and of each category."""
    acceptances = dict.fromkeys(row["acceptance"] for row in report["rows"])
    every = [row for acceptance in acceptances for row in _rows(report, acceptance)]
    rows = [row for row in every if row.get("tree_size", 1) > 1]
    axes = figure.subplots()
    for row in rows:
        shares = row["accepted_share_per_pos"]
        bold = row["category"] == OVERALL
        axes.plot(
            range(1, len(shares) + 1),
            shares,
            marker="o",
            linewidth=2.5 if bold else 1,
            alpha=1 if bold else 0.5,
            label=f"{row['acceptance']}, {row['category']}, {Path(label(row['system'])).name}",
        )
    axes.set_xlabel("guesses accepted, at least")
    axes.set_ylabel("share of steps")
    axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if rows:
        axes.legend()
    return bool(rows)


def _draw_steps(report: Report, figure: Any) -> bool:
    """Time of a step over the size of the tree, a line a batch size."""
    axes = figure.subplots()
    for batch in dict.fromkeys(row["batch_size"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["batch_size"] == batch]
        steps, nodes = [row["step_ms"] for row in rows], [row["nodes"] for row in rows]
        middle = [step["median"] for step in steps]
        axes.errorbar(nodes, middle, _error_bars(steps), marker="o", label=f"batch {batch}")
    axes.set_xlabel("tokens of the tree, root included")
    axes.set_ylabel("ms a step")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{report.get('preset') or Path(report['model']).name}, {report['dtype']}")
    axes.legend()
    return True


def _error_bars(spreads: list[dict[str, float]]) -> list[list[float]]:
    """Distances from the median down to the least and up to the greatest."""
    low = [spread["median"] - spread["min"] for spread in spreads]
    high = [spread["max"] - spread["median"] for spread in spreads]
    return [low, high]
