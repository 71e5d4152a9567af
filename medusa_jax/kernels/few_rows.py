"""Products of a weight with few rows on a CPU, as fast as the weight can be read.

A tree of 8 tokens multiplies 8 rows by each weight. XLA's product takes two to four times as
long as for a single row; `few_rows.cpp` reads each weight once for all of them. It is compiled
at first use, by the C++ compiler of the machine, and kept in the cache directory. Where there
is none, callers go on with XLA's product.

Beside weights in int8, rows are rounded to integers of 16 bits, and products are added up
exactly. Each row has a factor of its own, a power of two.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medusa_jax.files import cache_directory
from medusa_jax.progress import say
from medusa_jax.shapes import typed

log = logging.getLogger(__name__)

MOST_ROWS = 128  # from where on XLA's product is as fast
_SOURCES = {
    name: Path(__file__).with_name(name)
    for name in ("few_rows.h", "few_rows.cpp", "few_rows_level.cpp")
}
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w")
# Instruction sets that the arithmetic is compiled for: names of LEVEL, and the compiler's flags.
LEVELS: dict[str, tuple[str, ...]] = {"plain": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    _AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma",
               "-mprefer-vector-width=512")  # fmt: skip
    LEVELS |= {"avx2": ("-mavx2", "-mfma"), "avx512": _AVX512, "vnni": (*_AVX512, "-mavx512vnni")}


def available() -> bool:
    """Whether `product` works here: on a CPU whose compiler could build it."""
    return bool(level())


@functools.cache
def level() -> str:
    """The instruction set that `product` uses here, a key of `LEVELS`; "" where it cannot work."""
    if jax.default_backend() != "cpu":
        return ""
    try:
        loaded = ctypes.CDLL(str(library()))
        jax.ffi.register_ffi_target("medusa_few_rows", jax.ffi.pycapsule(loaded.FewRows), "cpu")
        loaded.few_rows_level.restype = ctypes.c_char_p
    except (OSError, subprocess.CalledProcessError, AttributeError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        log.warning("products of few rows are XLA's, which are slower: %s", *reason[:1])
        return ""
    return loaded.few_rows_level().decode()


@typed
def product(
    x: Float[Array, "*dims"], weight: Array, scale: Float[Array, "*of"] | None = None
) -> Float[Array, "*out"]:
    """W x of the last axis, accumulated and returned in float32.

    The numbers of a row do not depend on the other rows, not even in their last bits.
    Beside an int8 weight, the numbers of a row are rounded first: none moves by more than 2^-15
    of the row's largest. From there on, the sums are exact.

    Args:
      x: [*dims, in], or for a stack of M weights [*dims, M, in]; float32 or bfloat16.
      weight: [out, in] or [M, out, in]; float32, bfloat16 or int8.
      scale: of each output [out] or [M, out], which its sum is multiplied by.

    Returns:
      [*dims, out] or [*dims, M, out].
    """
    stack, out = weight.shape[:-2], weight.shape[-2]
    dims = x.shape[: -1 - len(stack)]
    factors = jnp.zeros(0) if scale is None else scale
    rows = jax.ShapeDtypeStruct((*dims, *stack, out), jnp.float32)
    return jax.ffi.ffi_call("medusa_few_rows", rows)(x, weight, factors)


def library() -> Path:
    """The compiled library, from the cache or compiled now.

    Raises:
      OSError: there is no compiler, or nothing can be written.
      CalledProcessError: the compiler refuses.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    compiler = compiler or shutil.which("clang++")
    include = jax.ffi.include_dir()
    # Whatever would make other code of it.
    sources = [source.read_text() for source in _SOURCES.values()]
    made_of = (*sources, repr(LEVELS), repr(_FLAGS), jax.__version__, str(compiler))
    name = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    file = cache_directory() / "kernels" / f"few_rows-{name}.so"
    if file.is_file():
        return file
    if compiler is None:
        raise OSError("no C++ compiler (c++, g++, clang++) is installed")
    file.parent.mkdir(parents=True, exist_ok=True)
    say(f"compiling products of few rows for this processor, once, into {file.parent}")
    with tempfile.TemporaryDirectory(dir=file.parent) as place, ThreadPoolExecutor() as pool:
        arithmetic, entry = _SOURCES["few_rows_level.cpp"], _SOURCES["few_rows.cpp"]
        parts = {level: (arithmetic, *flags, f"-DLEVEL={level}") for level, flags in LEVELS.items()}
        parts["entry"] = (entry, f"-I{include}")
        objects = {name: f"{place}/{name}.o" for name in parts}
        commands = [
            [compiler, *_FLAGS, "-c", *map(str, part), "-o", objects[name]]
            for name, part in parts.items()
        ]
        list(pool.map(_run, commands))
        made = Path(place, "library.so")
        _run([compiler, "-shared", *objects.values(), "-o", str(made)])
        made.replace(file)  # at once: another process may do the same
    return file


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
