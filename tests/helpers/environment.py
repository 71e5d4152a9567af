"""The environment that tests and the processes they start run in."""

import atexit
import os
import shutil
import signal
import sys
import tempfile

from helpers.paths import ROOT, TESTS

# Tests compile more than they compute: 40% of their time was LLVM's optimization. XLA's own passes
# over the program, and its kernels for matrix products, stay as they are.
LESS_OPTIMIZED = "--xla_backend_optimization_level=0"


def prepare() -> None:
    """Sets variables that JAX reads when it is imported. Workers and processes inherit them."""
    assert "jax" not in sys.modules, "JAX was imported before its environment was prepared"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # What one test compiles, other workers and processes need not compile again.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="medusa_jax_tests_")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
        atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ.setdefault("XLA_FLAGS", LESS_OPTIMIZED)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Jobs in a shell's background ignore Ctrl-C, and so would the processes that tests start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Scripts that tests start import this checkout's package and the helpers.
    paths = [str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def default_optimization() -> dict[str, str]:
    """The environment without `LESS_OPTIMIZED`, as users have it."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if flag != LESS_OPTIMIZED]
    return os.environ | {"XLA_FLAGS": " ".join(flags)}
