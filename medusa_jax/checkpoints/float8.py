"""8-bit floats of safetensors files, which the library's NumPy reader does not know."""

from pathlib import Path

import ml_dtypes
import numpy as np

from medusa_jax import json_files

NAME = "F8_E4M3"  # what safetensors calls them


def in_file(file: Path, name: str) -> np.ndarray:
    """A tensor of a file that the library has opened before; read from it where it is indexed."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json_files.parse(stream.read(size).decode(), str(file))
    about = header[name]
    begin = 8 + size + about["data_offsets"][0]
    return np.memmap(file, ml_dtypes.float8_e4m3fn, "r", begin, tuple(about["shape"]))
