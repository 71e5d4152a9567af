"""Options declared once: bounds for the library, flags for the command line."""

import argparse
import dataclasses

import pytest

from medusa_jax.cli import flags
from medusa_jax.errors import InputError
from medusa_jax.options import check, option


@dataclasses.dataclass(kw_only=True)
class Options:
    """One option of each shape."""

    name: str = option(help="required")
    count: int = option(3, least=1, most=9, help="a bounded number")
    rate: float | None = option(None, help="a number or nothing")
    sizes: list[int] = option([1, 2], nargs="+", least=1, help="several numbers")
    word: list[str] = option([], action="append", help="given again")
    color: str | None = option(None, choices=("red", "blue"), help="one of two")
    fast: bool = option(False, help="a switch")
    from_: str = option("", name="from", help="a word of Python")
    file: str | None = option(None, group="source", help="this")
    text: str | None = option(None, group="source", help="or that")
    hidden: int = 7


def parse(*arguments: str) -> Options:
    parser = flags.parser("What it does.", "an example")
    flags.add_flags(parser, Options)
    return flags.read(parser.parse_args([*arguments]), Options)


def test_flags_fill_in_the_dataclass():
    given = parse(
        "--name", "n", "--rate", "0.5", "--sizes", "4", "5", "--word", "a", "--word", "b",
        "--color", "blue", "--fast", "--from", "here", "--text", "t",
    )  # fmt: skip
    assert given == Options(
        name="n", rate=0.5, sizes=[4, 5], word=["a", "b"], color="blue", fast=True,
        from_="here", text="t",
    )  # fmt: skip
    assert given.count == 3 and given.hidden == 7


def test_defaults_are_not_shared():
    first, second = parse("--name", "n", "--text", "t"), parse("--name", "n", "--text", "t")
    first.sizes.append(3)
    first.word.append("w")
    assert second.sizes == [1, 2] and second.word == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "t"), "the following arguments are required: --name"),
        (("--name", "n"), "one of the arguments --file --text is required"),
        (("--name", "n", "--text", "t", "--file", "f"), "not allowed with argument"),
        (("--name", "n", "--text", "t", "--count", "many"), "invalid int value: 'many'"),
        (("--name", "n", "--text", "t", "--color", "green"), "invalid choice: 'green'"),
        (("--name", "n", "--text", "t", "--hidden", "1"), "unrecognized arguments: --hidden"),
        (("--name", "n", "--text", "t", "--coun", "1"), "unrecognized arguments: --coun"),
    ],
)
def test_argparse_exits_with_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
):
    with pytest.raises(SystemExit, match="2"):
        parse(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "--count must be at least 1, got 0"),
        ({"count": 10}, "--count must be at most 9, got 10"),
        ({"sizes": [4, 0]}, "--sizes must be at least 1, got 0"),
        ({"color": "green"}, "--color is 'green'; expected red, blue"),
        ({"rate": float("nan")}, "--rate must be a finite number, got nan"),
        ({"rate": float("-inf")}, "--rate must be a finite number, got -inf"),
    ],
)
def test_bounds_hold_for_the_library_too(values: dict, message: str):
    with pytest.raises(InputError, match=message):
        check(Options(name="n", **values))
    check(Options(name="n"))


def test_help_shows_each_option():
    parser = argparse.ArgumentParser()
    flags.add_flags(parser, Options)
    text = parser.format_help()
    assert "--from FROM_" in text and "a bounded number" in text and "--hidden" not in text
