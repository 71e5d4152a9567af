"""The word that chooses a program, and the flags of older command lines that do."""

import pytest

from medusa_jax.bench import __main__ as entry


@pytest.mark.parametrize(
    ("line", "program", "own"),
    [
        ("--output out", "prompts", "--output out"),
        ("--prompts steps --output out", "prompts", "--prompts steps --output out"),
        ("prompts --output out", "prompts", "--output out"),
        ("steps --model 110m", "steps", "--model 110m"),
        ("memory --model 110m --compile_only cpu:1", "memory", "--model 110m --compile_only cpu:1"),
        ("--random_weights 110m --sizes 1", "steps", "--random_weights 110m --sizes 1"),
        ("--sizes 1 --random_weights=110m", "steps", "--sizes 1 --random_weights=110m"),
        ("--random_weights x --compile_only cpu:1", "memory", "--model x --compile_only cpu:1"),
        ("--compile_only=cpu:1 --random_weights=x", "memory", "--compile_only=cpu:1 --model=x"),
        ("", "prompts", ""),
    ],
)  # fmt: skip
def test_a_program_is_chosen(line, program, own):
    assert entry.choose(line.split()) == (program, own.split())


@pytest.mark.parametrize("program", ["prompts", "steps", "memory"])
def test_help(program, capsys):
    with pytest.raises(SystemExit) as done:
        entry.main([program, "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert f"example:\n  python -m medusa_jax.bench {program}" in out


def test_help_without_a_word_names_the_other_programs(capsys):
    with pytest.raises(SystemExit):
        entry.main(["--help"])
    out = capsys.readouterr().out
    assert "medusa_jax.bench steps" in out and "medusa_jax.bench memory" in out
