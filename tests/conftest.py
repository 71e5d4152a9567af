"""What the tests share: models made on the spot, and the real ones beside a checkout.

Real models, traces and texts are other people's and lie in `../shared`. Tests
that need them skip in a bare clone; CI refuses to run without.
"""

import atexit
import io
import json
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one test compiles, other workers and the processes that tests start need not compile
    # again. JAX reads this when it is imported, and workers inherit it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="medusa_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Tests compile more than they compute: 40% of their time was LLVM's optimization. XLA's own passes
# over the program, and its kernels for matrix products, stay as they are.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from helpers.paths import ROOT, SCRIPT, SHARED, TESTS

# Scripts that tests start find this checkout's package and the helpers.
_PATHS = [str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(_PATHS)

import pytest
import torch
import transformers
from helpers.head_files import LAYERS, VOCAB, WIDTH
from helpers.models import TINY, TinyModel, random_model

from medusa_jax.checkpoints import conversion
from medusa_jax.checkpoints.load import Model, load_model


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
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    return model


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
