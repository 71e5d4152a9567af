"""What the tests share: models made on the spot, and the real ones beside a checkout.

Real models, traces and texts are other people's and lie in `../shared`. Tests
that need them skip in a bare clone; CI refuses to run without.
"""

import atexit
import dataclasses
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

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from checkpoints import LAYERS, VOCAB, WIDTH

from medusa_jax import convert
from medusa_jax.backbone import Backbone, causal_mask
from medusa_jax.config import ModelConfig
from medusa_jax.heads import HeadsConfig, MedusaHeads
from medusa_jax.hf import Model, load_model
from medusa_jax.training import stack
from medusa_jax.tree_paths import flat, nested

SCRIPT = Path(__file__).resolve().parents[1] / "decode.py"
SHARED = Path(__file__).resolve().parents[2] / "shared"


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


TINY = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    ffn_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context=128,
)


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A random model whose heads are random too: right now and then."""

    config: ModelConfig
    heads: HeadsConfig
    params: dict[str, Any]


def random_model(config: ModelConfig, num_heads: int = 3, seed: int = 0) -> TinyModel:
    """Random weights, large enough for the next token to be far from uniform."""
    heads = HeadsConfig(num_heads, 1, config.hidden_size, config.vocab_size)
    key_backbone, key_heads = jax.random.split(jax.random.key(seed))
    tokens = jnp.zeros((1, 2), jnp.int32)
    backbone = jax.jit(Backbone(config).init)(key_backbone, tokens, tokens, causal_mask(2))
    hidden = jnp.zeros((1, config.hidden_size))
    medusa = MedusaHeads(heads).init(key_heads, hidden, lambda x: x)
    return TinyModel(
        config,
        heads,
        {
            "backbone": jax.tree.map(lambda x: 3 * x if x.ndim == 2 else x, backbone["params"]),
            "heads": medusa["params"],
        },
    )


def stacked(params: dict[str, Any], layers: int) -> dict[str, Any]:
    """Parameters of a model with the backbone as the trainer holds it: layers stacked."""
    single = flat(params["backbone"])
    shapes = stack.shapes({path: leaf.shape for path, leaf in single.items()}, layers)
    leaves = {
        path: single[path]
        if path in single
        else jnp.stack([single[name] for name in stack.members(path, layers)])
        for path in shapes
    }
    return params | {"backbone": nested(leaves)}


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
        convert.convert(str(source), target, output, **({"base": str(saved)} | options))
        return output

    return call
