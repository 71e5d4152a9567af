"""Compiled programs are kept between processes, unless a flag or the environment says otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers.paths import ROOT

from medusa_jax.cli import compilation_cache, flags, runner


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No cache is configured, and the project's directory is `tmp_path`."""
    monkeypatch.setenv("MEDUSA_JAX_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def start(*arguments: str) -> None:
    parser = flags.parser("", "")
    with pytest.raises(SystemExit):
        runner.run(lambda namespace: None, parser.parse_args(arguments))


def test_commands_turn_the_cache_on_and_a_flag_leaves_it_off(unset: Path):
    start("--no_cache")
    assert jax.config.jax_compilation_cache_dir is None
    start()
    assert jax.config.jax_compilation_cache_dir == str(
        unset / "programs" / compilation_cache.processor()
    )


def test_a_cache_that_the_user_chose_stays(unset: Path):
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    start()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    assert not list(unset.iterdir())


def test_a_directory_that_cannot_be_made_is_said_once(
    unset: Path, caplog: pytest.LogCaptureFixture
):
    (unset / "programs").write_text("a file")
    start()
    assert jax.config.jax_compilation_cache_dir is None
    assert len(caplog.messages) == 1 and "compiled anew" in caplog.messages[0]


def test_the_least_recently_used_programs_go_first(tmp_path: Path):
    for used, name in enumerate(("old", "older", "new")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, ((5, 1, 9)[used], 0))
    compilation_cache.prune(tmp_path, 30)
    assert len(list(tmp_path.iterdir())) == 3
    compilation_cache.prune(tmp_path, 15)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.e2e
@pytest.mark.slow
def test_a_second_process_loads_what_the_first_compiled(tmp_path: Path):
    hits = "/jax/compilation_cache/cache_hits"
    program = f"""
import argparse, jax, jax.numpy as jnp
from medusa_jax.cli import compilation_cache, runner
compilation_cache.SHORTEST = 0
def main(namespace):
    seen = []
    jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((9, 9)))
    print(seen.count({hits!r}))
runner.run(main, argparse.Namespace(debug=False, no_cache=False))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"MEDUSA_JAX_CACHE": str(tmp_path)}

    def run() -> int:
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=ROOT, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        assert not done.stderr
        return int(done.stdout)

    assert run() == 0
    assert run() > 0
