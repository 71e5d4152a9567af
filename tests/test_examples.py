"""Each script of examples/ runs in a bare clone, on the shipped model, and keeps its promises."""

import re
import sys

import pytest
from helpers import bare_clone
from helpers.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LINES = 60
LINES_OF = {"05_custom_drafter": 40}

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_is_short_and_says_how_it_runs(script):
    text = script.read_text()
    assert len(text.splitlines()) <= LINES_OF.get(script.stem, LINES)
    assert f"    python examples/{script.name}\n" in text


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the scripts print in a bare clone, by number; in a single process, to save time."""
    target = bare_clone.clone(tmp_path_factory.mktemp("examples") / "clone")
    names = [f"examples/{script.name}" for script in EXAMPLES]
    code = f"import runpy\nfor name in {names}:\n    print('=====')\n"
    code += "    runpy.run_path(name, run_name='__main__')"
    out = bare_clone.run([sys.executable, "-c", code], target, optimized=False).stdout
    return dict(zip("12345", out.split("=====\n")[1:], strict=True))


def lengths(printed: str) -> list[float]:
    """The mean accepted lengths in a text: "2.50 tokens a step" -> [2.5]."""
    return [float(number) for number in re.findall(r"([\d.]+) tokens a step", printed)]


def test_decode_writes_the_plain_texts_in_fewer_steps(printed):
    printed = printed["1"]
    assert printed.count("same text as plain decoding: True") == 3
    assert len(lengths(printed)) == 3 and min(lengths(printed)) > 1.5
    assert len(printed.splitlines()[-1].split()) > 10  # the stream


def test_custom_trees_change_the_speed_and_not_the_text(printed):
    printed = printed["2"]
    assert "the text does not depend on the tree: True" in printed
    plain, *others = lengths(printed)
    assert plain == 1 and len(others) == 4 and min(others) > 1.5
    # [0], [1], [0, 0], [0, 1], [0, 0, 0] by depth: slots 1 and 2, 3 and 4, 5.
    assert "x x . x . x" in printed


def test_a_custom_acceptance_generalizes_greedy(printed):
    greedy, best, loose = lengths(printed["3"])
    assert greedy == best < loose


def test_heads_trained_in_seconds_already_guess(printed):
    assert lengths(printed["4"])[0] > 1


def test_a_custom_drafter_changes_the_speed_and_not_the_text(printed):
    texts = re.findall(r"tokens a step: (.+)", printed["5"])
    assert len(texts) == 3 and len(set(texts)) == 1
    assert min(lengths(printed["5"])) > 1
