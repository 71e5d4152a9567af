"""Where models are: local paths, hub ids, and the small model that ships with the package."""

import os
import re
from pathlib import Path

from medusa_jax.errors import InputError


def shipped(name: str = "") -> Path:
    """A file of the model that ships with the package; by default, its directory."""
    return Path(__file__).parents[1] / "shipped" / name


def resolve(name: str | Path) -> Path:
    """A local path as it is; anything that looks like `owner/name` from the hub."""
    path = Path(name)
    if os.path.exists(path):  # False for names that no file system takes, too
        return path
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
