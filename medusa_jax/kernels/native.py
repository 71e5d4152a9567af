"""The kernels in C++: compiled at first use, by the C++ compiler of the machine.

The library is kept in the cache directory. Where there is no compiler, callers go on with what
XLA makes. Arithmetic is compiled once for each instruction set; the widest that the processor
has is chosen when it runs.
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

from medusa_jax.files import cache_directory
from medusa_jax.progress import say

log = logging.getLogger(__name__)

# Names of the kernels, and of their entries in the library.
ENTRIES = {"few_rows": "FewRows", "cache_attention": "CacheAttention"}
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w")
# Instruction sets that the arithmetic is compiled for: names of LEVEL, and the compiler's flags.
LEVELS: dict[str, tuple[str, ...]] = {"plain": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    _AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma",
               "-mprefer-vector-width=512")  # fmt: skip
    LEVELS |= {"avx2": ("-mavx2", "-mfma"), "avx512": _AVX512, "vnni": (*_AVX512, "-mavx512vnni")}


def available() -> bool:
    """Whether the kernels work here: on a CPU whose compiler could build them."""
    return bool(level())


@functools.cache
def level() -> str:
    """The instruction set that they use here, a key of `LEVELS`; "" where they cannot work."""
    if jax.default_backend() != "cpu":
        return ""
    try:
        loaded = ctypes.CDLL(str(library()))
        for kernel, entry in ENTRIES.items():
            capsule = jax.ffi.pycapsule(getattr(loaded, entry))
            jax.ffi.register_ffi_target(f"medusa_{kernel}", capsule, "cpu")
        loaded.widest_level.restype = ctypes.c_char_p
    except (OSError, subprocess.CalledProcessError, AttributeError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        log.warning(
            "products of few rows and attention are XLA's, which are slower: %s", *reason[:1]
        )
        return ""
    return loaded.widest_level().decode()


def library() -> Path:
    """The compiled library, from the cache or compiled now.

    Raises:
      OSError: there is no compiler, or nothing can be written.
      CalledProcessError: the compiler refuses.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    compiler = compiler or shutil.which("clang++")
    here = Path(__file__).parent
    # Whatever would make other code of it.
    sources = [file.read_text() for file in sorted((*here.glob("*.cpp"), *here.glob("*.h")))]
    made_of = (*sources, repr(LEVELS), repr(_FLAGS), jax.__version__, str(compiler))
    name = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    file = cache_directory() / "kernels" / f"kernels-{name}.so"
    if file.is_file():
        return file
    if compiler is None:
        raise OSError("no C++ compiler (c++, g++, clang++) is installed")
    file.parent.mkdir(parents=True, exist_ok=True)
    say(f"compiling kernels for this processor, once, into {file.parent}")
    with tempfile.TemporaryDirectory(dir=file.parent) as place, ThreadPoolExecutor() as pool:
        objects = list(pool.map(functools.partial(_object, compiler, Path(place)), *_parts(here)))
        made = Path(place, "library.so")
        _run([compiler, "-shared", *map(str, objects), "-o", str(made)])
        made.replace(file)  # at once: another process may do the same
    return file


def _parts(here: Path) -> tuple[list[Path], list[tuple[str, ...]]]:
    """What is compiled by itself: source files, and the flags of each."""
    include = f"-I{jax.ffi.include_dir()}"
    parts = [(here / f"{kernel}.cpp", (include,)) for kernel in ENTRIES]
    for level, flags in LEVELS.items():
        flags = (*flags, f"-DLEVEL={level}")
        parts += [(here / f"{kernel}_level.cpp", flags) for kernel in ENTRIES]
    files, flags_of = zip(*parts, strict=True)
    return list(files), list(flags_of)


def _object(compiler: str, place: Path, source: Path, flags: tuple[str, ...]) -> Path:
    target = place / f"{source.stem}-{abs(hash(flags))}.o"
    _run([compiler, *_FLAGS, *flags, "-c", str(source), "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
