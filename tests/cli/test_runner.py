"""How a command ends: its exit code, and a message instead of a traceback."""

import argparse

import pytest

from medusa_jax.cli import runner
from medusa_jax.errors import InputError
from medusa_jax.files import OutputError


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("give another file"), 2, "error: give another file\n"),
        (
            OutputError("x.json could not be written"),
            1,
            "error: x.json could not be written\n",
        ),
        (ValueError("no digits"), 1, "error: ValueError: no digits\n"),
    ],
)
def test_errors_are_one_message(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int, message: str
):
    def fail(_: argparse.Namespace) -> None:
        raise error

    with pytest.raises(SystemExit) as done:
        runner.run(fail, argparse.Namespace(debug=False, no_cache=True))
    assert (done.value.code, capsys.readouterr().err) == (code, message)
    with pytest.raises(SystemExit):
        runner.run(fail, argparse.Namespace(debug=True, no_cache=True))
    err = capsys.readouterr().err
    assert "in fail\n    raise error" in err and err.endswith(message)
