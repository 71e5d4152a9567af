"""The README's library example runs as it stands."""

import re

import pytest
from helpers.paths import ROOT

README = ROOT / "README.md"


@pytest.mark.e2e
@pytest.mark.slow
def test_the_library_example_runs(shared, capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.S).group(1)
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 12
    models = shared / "models"
    exec(code, {"MODEL": models / "stories260K", "HEADS": models / "stories260K-medusa"})
    printed = capsys.readouterr().out
    assert len(printed.split()) > 40 and re.search(r"\d\.\d+\n$", printed)
