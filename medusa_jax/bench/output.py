"""The files of a report."""

import sys
from pathlib import Path
from typing import Any

from medusa_jax import json_files
from medusa_jax.bench.report import markdown, plots


def write_report(report: dict[str, Any], path: str, **more: Any) -> None:
    """Prints the table, and writes bench.json, bench.md and plots into a directory.

    Args:
      more: contents of other JSON files, by name without ".json".
    """
    text, directory = markdown(report), Path(path)
    print(text)
    directory.mkdir(exist_ok=True)
    contents = {"bench": report} | more
    for name, content in contents.items():
        json_files.write(directory / f"{name}.json", content)
    (directory / "bench.md").write_text(text + "\n", encoding="utf-8")
    files = [f"{name}.json" for name in contents] + ["bench.md", *plots(report, directory)]
    print(f"{directory}: {', '.join(files)}", file=sys.stderr)
