"""README.md and docs/quickstart.md keep their word: each command and each example runs as printed.

They run in a copy of the checkout, with nothing beside it. Only `pip install` is left out. The
Python examples compile as users do. Commands compile as other tests do, and share their programs.
"""

import re
import sys

import pytest
from helpers import bare_clone
from helpers.paths import ROOT

README = ROOT / "README.md"
PAGES = (README, ROOT / "docs/quickstart.md")
WORDS = 700


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= WORDS


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", README.read_text())
    local = [target for target in targets if not target.startswith("https://")]
    assert len(local) > 10
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_commands_are_read_as_a_shell_would(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\npip install -e . && python a.py --x 'b c'\n```\ntext\n"
        "```text\npython no.py\n```\n```bash\npython -m d \\\n    --e f\n```\n"
    )
    assert bare_clone.commands(page) == ["python a.py --x 'b c'", "python -m d      --e f"]


@pytest.mark.e2e
@pytest.mark.slow
def test_each_command_runs_in_a_bare_clone(tmp_path):
    target = bare_clone.clone(tmp_path / "clone")
    readme, quickstart = (bare_clone.commands(page) for page in PAGES)
    assert len(readme) >= 7 and len(quickstart) >= 8
    lines = dict.fromkeys([*readme, *quickstart])  # what both pages print runs once
    done = {line: bare_clone.run_line(line, target) for line in lines}
    decoded = {line: result for line, result in done.items() if "--prompt " in line}
    assert len(decoded) == 4
    for result in decoded.values():
        assert "tokens/s" in result.stderr and len(result.stdout.split()) > 20
    (compared,) = (result for line, result in decoded.items() if "--compare" in line)
    assert re.search(r"ratio [\d.]+x; 1 of 1 texts are the same", compared.stderr)
    (trained,) = (result for line, result in decoded.items() if "--heads" in line)
    lengths = re.search(r"mean accepted length ([\d.]+)", trained.stderr)
    assert lengths and float(lengths[1]) > 1.2


@pytest.mark.e2e
@pytest.mark.slow
def test_the_python_examples_run(tmp_path):
    """That of each page, one after the other in a single process."""
    target = bare_clone.clone(tmp_path / "clone")
    codes = [code for page in PAGES for code in bare_clone.blocks(page, "python")]
    assert len(codes) == len(PAGES)
    divided = "\nprint('-' * 8)\n".join(codes)
    texts = bare_clone.run([sys.executable, "-c", divided], target).stdout.split("-" * 8)
    assert len(texts) == len(codes)
    assert all(len(text.split()) > 20 for text in texts)
