"""The environment that tests and the processes they start run in."""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from importlib.metadata import version

from helpers.paths import ROOT, TESTS

# Tests compile more than they compute. XLA's kernels for matrix products stay as they are.
# These leave XLA's passes over the program alone, and so the compiled HLO.
SAME_HLO = [
    "--xla_backend_optimization_level=0",  # LLVM's optimization was 40% of the time
    "--xla_cpu_parallel_codegen_split_count=1",  # each worker has a core
]
LESS_OPTIMIZED = [*SAME_HLO]
# Garbage is looked for less often than Python does: a tenth of the time went to it, since imported
# modules and traced programs are many objects that stay.
ALLOCATIONS = 50_000, 20, 50
USERS_GENERATOR: dict[str, bool] = {}  # an option of `compile` that gives the HLO that users have
if version("jaxlib").startswith("0.10."):  # later releases lack the choice, and refuse its name
    # XLA's older code generator takes a third of the time of that by way of MLIR.
    LESS_OPTIMIZED.append("--xla_cpu_use_fusion_emitters=false")
    USERS_GENERATOR["xla_cpu_use_fusion_emitters"] = True


def prepare() -> None:
    """Sets variables that JAX reads when it is imported. Workers and processes inherit them."""
    assert "jax" not in sys.modules, "JAX was imported before its environment was prepared"
    gc.set_threshold(*ALLOCATIONS)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # What one test compiles, other workers and processes need not compile again.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="medusa_jax_tests_")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ.setdefault("XLA_FLAGS", " ".join(LESS_OPTIMIZED))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Jobs in a shell's background ignore Ctrl-C, and so would the processes that tests start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Scripts that tests start import this checkout's package and the helpers.
    paths = [str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def default_passes() -> dict[str, str]:
    """An environment in which XLA compiles to the HLO that users have."""
    flags = os.environ["XLA_FLAGS"].split()
    flags = [flag for flag in flags if flag in SAME_HLO or flag not in LESS_OPTIMIZED]
    return os.environ | {"XLA_FLAGS": " ".join(flags)}
