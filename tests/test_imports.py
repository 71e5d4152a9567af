"""Which module may know which: imports point down this list, never up or sideways in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

import medusa_jax

PACKAGE = Path(medusa_jax.__file__).parent

# A module may import those of earlier lines, and those before it on its own.
LEVELS = [
    ["errors", "shapes"],
    ["config", "tree", "cli"],
    ["layers", "sampling", "cache", "tensor_files"],
    ["backbone", "acceptance"],
    ["heads"],
    ["state", "hf"],
    ["decode", "text"],
    ["figures", "records"],
    ["answer"],
    ["console"],
]
# Third-party packages and the only modules that may import them.
WALLS = {
    "flax": {"backbone", "heads", "decode"},
    "safetensors": {"tensor_files"},
    "torch": {"tensor_files"},
    "transformers": {"text"},
    "huggingface_hub": {"hf"},
    "tqdm": {"console"},
}
TRAINING = ["optax", "orbax", "datasets", "chex", "torch"]


def _imports(module: str) -> set[str]:
    """Every imported name of a module, also those inside functions."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "medusa_jax":
            names |= {f"medusa_jax.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_every_module_has_a_level():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == {module for level in LEVELS for module in level}


def test_imports_point_down():
    order = [module for level in LEVELS for module in level]
    for position, module in enumerate(order):
        ours = {name.split(".")[1] for name in _imports(module) if name.startswith("medusa_jax.")}
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
