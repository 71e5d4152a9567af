"""Which module may know which: imports point down this list, never up or sideways in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

import medusa_jax

PACKAGE = Path(medusa_jax.__file__).parent

# A module may import those of earlier lines, and those before it on its own.
LEVELS = [
    ["errors", "shapes", "tree_paths"],
    ["config", "tree", "cli"],
    ["topology", "compile_only"],
    ["sharding", "layout", "grow", "presets", "layers", "sampling", "cache", "tensor_files"],
    ["directories", "bigrams"],
    ["backbone", "acceptance"],
    ["heads"],
    ["state", "places", "dialects", "hf"],
    ["decode", "text", "calibration", "tuned"],
    ["figures", "records"],
    ["answer"],
    ["choices", "talks"],
    ["console"],
    ["training.settings", "training.corpus"],
    ["training.config_file", "training.encoding", "training.packing", "training.batches"],
    ["training.lora", "training.stack", "training.losses", "training.objective"],
    ["training.optimizer", "training.sharding", "training.state", "training.weights"],
    ["training.program"],
    ["training.export", "training.checkpoints", "training.metrics"],
    [
        "training.rows",
        "training.loop",
        "training.trainer",
        "training.compile_only",
    ],
    ["export", "distill", "count_bigrams", "tune_report", "tune", "convert"],
    ["bench.peers", "bench.runs", "bench.figures", "bench.report", "bench.random_weights"],
    ["bench.compile_only"],
    ["bench.__main__"],
]
# Third-party packages and the only modules that may import them.
WALLS = {
    "flax": {"backbone", "heads", "decode", "training.lora"},
    "safetensors": {"tensor_files"},
    "torch": {"tensor_files", "bench.peers"},
    "transformers": {"text", "bench.peers"},
    "huggingface_hub": {"hf"},
    "matplotlib": {"bench.report", "tune_report"},
    "tqdm": {
        "console",
        "count_bigrams",
        "distill",
        "tune",
        "bench.__main__",
        "bench.runs",
        "training.metrics",
    },
    "datasets": {"training.corpus"},
    "optax": {"training.optimizer", "training.state", "training.program"},
    "orbax": {"training.checkpoints"},
    "tensorboardX": {"training.metrics"},
    "absl": {"training.config_file"},
    "ml_collections": {"training.config_file"},
}
TRAINING = ["optax", "orbax", "datasets", "chex", "torch", "medusa_jax.training"]


def _imports(module: str) -> set[str]:
    """Every imported name of a module, also those inside functions."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in (
            "medusa_jax",
            "medusa_jax.training",
        ):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_every_module_has_a_level():
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    modules = {".".join(path.parts) for path in paths if path.name != "__init__"}
    assert modules == {module for level in LEVELS for module in level}


def test_imports_point_down():
    order = [module for level in LEVELS for module in level]
    for position, module in enumerate(order):
        names = {name for name in _imports(module) if name.startswith("medusa_jax.")}
        ours = {name.removeprefix("medusa_jax.") for name in names}
        assert ours <= set(order[:position]), f"{module} imports {ours - set(order[:position])}"


def test_walls_around_third_party_packages():
    for module in (module for level in LEVELS for module in level):
        for package, allowed in WALLS.items():
            if any(name.split(".")[0] == package for name in _imports(module)):
                assert module in allowed, f"{module} imports {package}"


def test_decoding_does_not_import_the_training_stack():
    code = f"import medusa_jax.decode, sys; print([m for m in {TRAINING} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
