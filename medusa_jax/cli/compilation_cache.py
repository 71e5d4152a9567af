"""Compiled programs that outlive their process: JAX's persistent cache, on for all commands.

A new process then loads a program instead of compiling it. `--no_cache` turns it off, and
JAX_COMPILATION_CACHE_DIR puts it elsewhere. A library leaves both to who imports it.
"""

import hashlib
import logging
import os
import platform
import re
from pathlib import Path
from typing import Any

from medusa_jax.files import cache_directory

log = logging.getLogger(__name__)

MOST_BYTES = 2 << 30
SHORTEST = 0.3  # seconds of a compilation that is worth a file


def keep_programs() -> None:
    """Turns the cache on, in $MEDUSA_JAX_CACHE/programs, and drops what was used longest ago."""
    import jax

    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is not None:
        return
    directory = cache_directory() / "programs" / processor()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        prune(directory, MOST_BYTES)
    except OSError as error:
        log.warning("programs are compiled anew by each process: %s", error)
        return
    settings.update("jax_compilation_cache_dir", str(directory))
    settings.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)


def prune(directory: Path, most: int) -> None:
    """Removes files from the least recently used on, until the rest has at most so many bytes."""
    files = [(entry.stat(), entry.path) for entry in os.scandir(directory) if entry.is_file()]
    total = sum(stat.st_size for stat, _ in files)
    for stat, path in sorted(files, key=lambda file: file[0].st_atime):
        if total <= most:
            return
        Path(path).unlink(missing_ok=True)  # another process may have been quicker
        total -= stat.st_size


def processor() -> str:
    """A name for this kind of processor: code for another may hold instructions it lacks.

    JAX's own key does not tell processors apart, and home directories are shared.
    """
    try:
        flags = re.findall(r"^(?:flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        flags = []
    known = "\n".join([platform.machine(), platform.processor(), *flags[:1]])
    return hashlib.sha256(known.encode()).hexdigest()[:12]
