"""MkDocs hook: the API pages, one for the public names and one for each folder of the package.

The pages follow the modules that exist, so a new module needs no change here.
"""

from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).resolve().parents[1] / "medusa_jax"
INDEX = """# API

The public names of `import medusa_jax`. Docstrings use the letters of [`shapes`](#letters) for
array dimensions.

::: medusa_jax
    options:
      members: true
      show_root_heading: false
      show_root_toc_entry: false

## Letters

::: medusa_jax.shapes
    options:
      members: false
      show_root_heading: false
      show_root_toc_entry: false

## Base modules
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds `api/index.md` and `api/FOLDER.md`."""
    base = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
    index = INDEX + "".join(reference(name) for name in base if name != "shapes")
    files.append(File.generated(config, "api/index.md", content=index))
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))
        page = f"# {folder.name}\n\n" + introduction(folder.name)
        page += "".join(reference(f"{folder.name}.{name}") for name in names)
        files.append(File.generated(config, f"api/{folder.name}.md", content=page))
    return files


def reference(name: str) -> str:
    """The mkdocstrings block of one module: "model.config" -> "::: medusa_jax.model.config"."""
    return f"\n::: medusa_jax.{name}\n"


def introduction(folder: str) -> str:
    """The docstring of a folder's `__init__`."""
    options = ["members: false", "show_root_heading: false", "show_root_toc_entry: false"]
    lines = "".join(f"      {option}\n" for option in options)
    return f"::: medusa_jax.{folder}\n    options:\n{lines}"


class Shapes(griffe.Extension):
    """Keeps Markdown from reading two array shapes in a row as a link.

    "[root, guesses] [N]" would be the text "root, guesses" with a link to "N"; an invisible word
    joiner between them prevents it.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("] [", "]\u2060 [")
