"""Where a command writes: checked before anything takes long."""

from pathlib import Path

from medusa_jax.errors import InputError


def check_output(path: str | None) -> None:
    """Raises InputError where a file cannot be made at `path`."""
    if path and not Path(path).absolute().parent.is_dir():
        raise InputError(f"--output {path}: its directory does not exist")
