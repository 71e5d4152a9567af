"""A config file and the overrides on the command line, as one `Config`."""

import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from medusa_jax.errors import InputError
from medusa_jax.training.settings import Config, by_name


def read_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Runs `get_config()` of a Python file and applies `--config.name=value` flags.

    Raises:
      InputError: no such file, an unknown field (the nearest name is
        suggested), or a value of another type.
    """
    if not Path(path).is_file():
        raise InputError(f"--config {path} does not exist; see configs/ for what ships")
    known = by_name(dataclasses.asdict(Config()))
    for override in overrides:
        match = re.match(r"--config\.([\w.]+)", override)
        if match and match.group(1) not in known:
            near = difflib.get_close_matches(match.group(1), known, n=1, cutoff=0)
            raise InputError(f"unknown setting {match.group(1)!r}; did you mean {near[0]!r}?")
    values = flags.FlagValues()
    arguments = ["train.py", f"--config={path}", *overrides]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    directory = str(Path(path).resolve().parent)
    sys.path.insert(0, directory)  # a config may import the files beside it, as a script does
    try:
        rest = values(arguments)[1:]
    except InputError:
        raise
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(f"--config {path}: {str(error).strip().splitlines()[0]}") from None
    finally:
        sys.path.remove(directory)
    if rest:
        raise InputError(f"not understood: {' '.join(rest)} (settings are --config.name=value)")
    config = holder.value
    if not isinstance(config, Config):
        raise InputError(f"{path}: get_config() returned {type(config).__name__}, not a Config")
    return config
