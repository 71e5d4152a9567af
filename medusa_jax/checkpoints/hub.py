"""Where models are: local paths, hub ids, and the small model that ships with the package."""

import re
from pathlib import Path

from medusa_jax.errors import InputError


def shipped(name: str = "") -> Path:
    """A file of the model that ships with the package; by default, its directory."""
    return Path(__file__).parents[1] / "shipped" / name


def resolve(name: str | Path) -> Path:
    """A local path as it is; anything that looks like `owner/name` from the hub."""
    path = Path(name)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise InputError(f"{name} does not exist (and is not a hub id of the form owner/name)")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.pt", "*.bin"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name} is no local path and could not be had from the hub: {reason}"
        ) from None
