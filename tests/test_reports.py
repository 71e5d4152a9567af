"""Markdown tables of measurements."""

from medusa_jax.reports import number_cell, spread_cell, table


def test_a_column_without_content_is_left_out():
    assert table(["a", "b", "c"], [["1", "-", "2"], ["-", "-", "3"]]) == (
        "| a | c |\n| --- | --- |\n| 1 | 2 |\n| - | 3 |"
    )


def test_cells():
    seconds = {"median": 0.0025, "min": 0.0024, "max": 0.0029}
    assert spread_cell(seconds, "{:.1f}", scale=1e3) == "2.5 (2.4 to 2.9)"
    assert spread_cell(None, "{:.1f}") == number_cell(None, "{:.1f}") == "-"
    assert number_cell(0.5, "{:.0%}") == "50%"
