"""The shape of the house: which folder may import which, and how long its parts may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.paths import ROOT

import medusa_jax

PACKAGE = Path(medusa_jax.__file__).parent

# A folder may import itself, and the folders that are named beside it; top-level modules stand
# under their own name. docs/architecture.md draws this table.
BASE = {"errors", "files", "freed_memory", "gguf_file", "interrupts", "json_files", "options"}
BASE |= {"param_paths", "progress", "reports", "shapes"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "freed_memory": set(),
    "interrupts": set(),
    "gguf_file": {"errors"},
    "json_files": {"errors", "files"},
    "shapes": set(),
    "param_paths": set(),
    "options": {"errors"},
    "progress": set(),
    "reports": set(),
    "kernels": BASE,
    "data": BASE,
    "model": BASE | {"kernels"},
    "distributed": BASE | {"model"},
    "drafting": BASE | {"model"},
    "decoding": BASE | {"model", "distributed", "drafting"},
    "checkpoints": BASE | {"kernels", "model", "distributed", "drafting"},
    "serving": BASE
    | {"data", "kernels", "model", "distributed", "drafting", "decoding", "checkpoints"},
    "training": BASE | {"data", "model", "distributed", "drafting", "checkpoints"},
}
LIBRARY = set(MAY_IMPORT)
MAY_IMPORT |= {
    "tuning": LIBRARY - {"training"},
    "server": BASE | {"data", "drafting", "decoding", "checkpoints", "serving"},
    "cli": LIBRARY - {"training"},
    "bench": (LIBRARY | {"tuning", "cli"}) - {"training"},
}
ENTRIES = {"convert", "count_bigrams", "decode", "distill", "export", "serve", "train", "tune"}
MAY_IMPORT |= {entry: LIBRARY | {"tuning", "cli", "server"} for entry in ENTRIES}
# Third-party packages and the only folders that may import them.
WALLS = {
    "datasets": {"data"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "prometheus_client": {"server"},
    "pydantic": {"server"},
    "uvicorn": {"server"},
    "etils": {"training"},
    "matplotlib": {"reports"},
    "gguf": {"gguf_file"},
    "flax": {"model", "drafting", "decoding", "training", "param_paths"},
    "huggingface_hub": {"checkpoints"},
    "ml_collections": {"training"},
    "optax": {"training"},
    "orbax": {"training"},
    "qwix": {"checkpoints"},
    "safetensors": {"checkpoints"},
    "tensorboardX": {"training"},
    "torch": {"checkpoints", "bench"},
    "tqdm": {"progress"},
    "transformers": {"data", "bench"},
}
TRAINING = ["optax", "orbax", "datasets", "chex", "torch", "medusa_jax.training"]
# Longest file, function and class of the code in these folders, in lines.
FILE, FUNCTION, CLASS = 350, 60, 150
CODE = ("medusa_jax", "tests", "benchmarks", "configs", "docs", "examples", "recipes")


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    """Place (folder, or name at the top level), path and syntax of every module but `__init__`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if path != PACKAGE / "__init__.py":
            yield place, path, ast.parse(path.read_text())


def imports(tree: ast.Module) -> set[str]:
    """Every imported name, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.slow
def test_imports_point_to_the_left():
    wrong = []
    for place, path, tree in modules():
        for name in imports(tree):
            package, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if package == "medusa_jax" and target not in MAY_IMPORT[place] | {place}:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_third_party_packages_stay_behind_their_walls():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for place, path, tree in modules()
        for name in imports(tree)
        if place not in WALLS.get(name.split(".")[0], {place})
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_longer_than_a_reader_can_hold():
    long = []
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        text, name = path.read_text(), path.relative_to(ROOT)
        if (lines := len(text.splitlines())) > FILE:
            long.append(f"{name} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > (CLASS if isinstance(node, ast.ClassDef) else FUNCTION):
                    long.append(f"{name}: {node.name} has {size} lines")
    assert not long, "\n".join(long)


@pytest.mark.e2e
def test_decoding_does_not_import_the_training_stack():
    code = f"import medusa_jax.decode, sys; print([m for m in {TRAINING} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.e2e
def test_a_command_listens_for_signals_before_anything_large_is_imported():
    code = "import medusa_jax.cli.start, sys; print({'jax', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_public_names_are_imported_when_they_are_asked_for():
    assert sorted(medusa_jax.__all__) == sorted(medusa_jax._PLACES)
    assert all(getattr(medusa_jax, name).__name__ == name for name in medusa_jax.__all__)
    with pytest.raises(AttributeError, match="'Nothing'"):
        _ = medusa_jax.Nothing
