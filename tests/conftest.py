"""Fixtures that the tests share: models made on the spot, and the real ones beside a checkout.

Real models, traces and texts are other people's and lie in `../shared`. Tests
that need them skip in a bare clone; CI refuses to run without.
"""

import gc
import io
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

from helpers import environment

environment.prepare()  # before JAX is imported

import jax
import pytest
import transformers
from helpers.head_files import random_llama
from helpers.models import TINY, TinyModel, random_model
from helpers.paths import SCRIPT, SHARED
from helpers.runs import finished, place  # noqa: F401 (fixtures)

from medusa_jax.checkpoints import conversion
from medusa_jax.checkpoints.load import Model, load_model
from medusa_jax.serving import programs

MOST_MAPS = 20_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of whole programs come first: a long file that begins last keeps a worker waiting."""
    long = {item.path for item in items if item.get_closest_marker("e2e")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """What is imported by now stays, so nobody looks for garbage in it (`environment.py`)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs when a file ends, where there are many.

    Each has hundreds of memory maps. A process may have 65,530 on Linux, behind which XLA crashes.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MOST_MAPS:
        programs._COMPILED.clear()
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and recorded traces."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (real models and recorded traces), which a bare clone lacks")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Model:
    """The 260K-parameter TinyStories model with its five Medusa heads."""
    return load_model(shared / "models/stories260K", shared / "models/stories260K-medusa")


@pytest.fixture(scope="session")
def golden(shared: Path) -> list[dict[str, Any]]:
    """Recorded runs of the original PyTorch implementation."""
    return json.loads((shared / "golden/original_stories260K.json").read_text())


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs decode.py in this process: (exit code, stdout, stderr)."""

    def call(*flags: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["decode.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return int(done.value.code or 0), out.out, out.err

    return call


@pytest.fixture
def run_module(monkeypatch, capsys):
    """Runs a module of the package in this process, as `python -m` does: (exit code, stderr)."""

    def call(name: str, *flags: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        monkeypatch.delitem(sys.modules, f"medusa_jax.{name}", raising=False)
        with pytest.raises(SystemExit) as done:
            runpy.run_module(f"medusa_jax.{name}", run_name="__main__")
        out = capsys.readouterr()
        assert "Traceback" not in out.err and out.out == ""
        return int(done.value.code or 0), out.err

    return call


@pytest.fixture(scope="session")
def tiny() -> TinyModel:
    """A two-layer random model that any clone can make."""
    return random_model(TINY)


@pytest.fixture(scope="session")
def llama() -> transformers.PreTrainedModel:
    """A random untied Llama with biases, so that all kinds of tensor occur."""
    return random_llama()


@pytest.fixture(scope="session")
def saved(llama: transformers.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model as one safetensors file."""
    directory = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(directory)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def go(saved: Path, tmp_path: Path):
    """Converts heads to a new directory and returns it; `saved` is the backbone."""

    def call(source: Path, target: str, **options: Any) -> Path:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}-{target}"
        conversion.convert(str(source), target, output, **({"base": str(saved)} | options))
        return output

    return call
