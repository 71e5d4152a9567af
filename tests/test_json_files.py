"""The reader of JSON: foreign texts end in an `InputError` that names file and field."""

import math

import pytest

from medusa_jax import json_files
from medusa_jax.errors import InputError
from medusa_jax.json_files import Fields


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 50_000, "nested too deeply"),
        ("[" + "9" * 6000 + "]", "not JSON"),
        ("{'a': 1}", "not JSON"),
        ("", "not JSON"),
    ],
)
def test_foreign_texts_are_refused_by_name(tmp_path, text, reason):
    with pytest.raises(InputError, match=f"^here: .*{reason}"):
        json_files.parse(text, "here")
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(InputError, match=f"x.json: .*{reason}"):
        json_files.read(file)


def test_halves_of_surrogate_pairs_become_the_replacement_character():
    text = r'{"a\ud83d": ["\ud83d\ude00", "x\uDE00y", {"b": "\uD800"}]}'
    assert json_files.parse(text, "") == {"a�": ["😀", "x�y", {"b": "�"}]}
    assert json_files.whole_text("a\ud83d\ude00\udcff") == "a😀�"


@pytest.mark.slow
def test_files_that_are_none(tmp_path):
    for file, reason in ((tmp_path, "is no file"), (tmp_path / "x", "does not exist")):
        with pytest.raises(InputError, match=reason):
            json_files.read(file)
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"x: .*utf-8"):
        json_files.read(tmp_path / "x")
    (tmp_path / "x").write_text("[1]")
    with pytest.raises(InputError, match="holds a JSON list, expected an object"):
        json_files.read_object(tmp_path / "x")
    with open(tmp_path / "x", "wb") as file:
        file.truncate(2**29)
    with pytest.raises(InputError, match="too many"):
        json_files.read(tmp_path / "x")


def test_fields_have_types_and_bounds():
    content = {"n": 3, "x": 0.5, "on": True, "name": "a", "ids": [2, 3], "none": None, "in": {}}
    fields = Fields(content, "config.json")
    assert (fields.integer("n"), fields.number("x"), fields.number("n")) == (3, 0.5, 3.0)
    assert (fields.flag("on"), fields.text("name"), fields.inner("in").content) == (True, "a", {})
    assert (fields.integers("ids"), fields.integers("n")) == ((2, 3), (3,))
    assert (fields.integer("none", 7), fields.number("no", 1.5)) == (7, 1.5)
    assert (fields.flag("no"), fields.integers("no")) == (False, ())
    with pytest.raises(InputError, match=r"config\.json has no 'none'"):
        fields.integer("none")


def test_numbers_have_bounds():
    fields = Fields({"a": 2, "b": 0.5}, "config.json")
    assert fields.number("a", least=2, most=2) == 2.0
    assert fields.number("no", 7.0, most=1) == 7.0  # a default is not checked
    for bounds, said in (
        ({"least": 1}, "from 1"),
        ({"most": 0.1}, "up to 0.1"),
        ({"above": 0.5, "most": 3}, "above 0.5 up to 3"),
    ):
        with pytest.raises(InputError, match=rf"'b' must be a finite number {said}, got 0\.5"):
            fields.number("b", **bounds)


EVIL = [True, "1", [], {}, 0, -1, 2**31, 10**6000, 0.5, math.nan, math.inf, 1e308, [None], [[]]]


@pytest.mark.parametrize("value", EVIL, ids=lambda value: json_files.short(value)[:12])
def test_evil_values_are_refused_by_the_name_of_their_field(value):
    fields = Fields({"key": value}, "config.json")
    asked = {
        "integer": lambda: fields.integer("key"),
        "number": lambda: fields.number("key", above=0),
        "flag": lambda: fields.flag("key"),
        "text": lambda: fields.text("key"),
        "integers": lambda: fields.integers("key"),
        "inner": lambda: fields.inner("key"),
    }
    good = {"number": (0.5, 2**31), "flag": (True,), "text": ("1",), "inner": ({},)}
    good |= {"integers": ([], 0)}
    for name, ask in asked.items():
        if any(type(value) is type(one) and value == one for one in good.get(name, ())):
            ask()
        else:
            with pytest.raises(InputError, match=r"config\.json: 'key' must be .*, got "):
                ask()


def test_writing_is_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    json_files.write(file, {"a": [1]})
    with pytest.raises(TypeError):
        json_files.write(file, {"a": object()})
    assert json_files.read(file) == {"a": [1]}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_lists_of_strings():
    fields = Fields({"several": ["a", "b"], "none": [], "mixed": ["a", 1], "text": "a"}, "x.json")
    assert fields.texts("several") == ("a", "b")
    assert fields.texts("none") == fields.texts("absent") == ()
    for key in ("mixed", "text"):
        with pytest.raises(InputError, match=f"x.json: '{key}' must be a list of strings"):
            fields.texts(key)
