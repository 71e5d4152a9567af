"""Machines that are not here: a TPU slice or a GPU by name, for the compiler alone."""

import os
import re
from pathlib import Path
from typing import Any

import jax

from medusa_jax.errors import InputError

# Memory of one chip in GiB (Google Cloud's documentation of each generation).
CHIP_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
GPU = "h100"
_GPU_CONFIG = Path(__file__).with_name("h100.textproto")  # as XLA describes one to its compiler
_HOST = (2, 2, 1)  # chips of a host along each axis
# What libtpu asks of a machine with TPUs, and complains of without. No device is opened, so
# several processes may load it, and the type of this machine does not matter.
COMPILER_ONLY = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def devices(name: str) -> list[Any]:
    """Devices of a topology: "v5e:4x4", "v5p:2x2x2", "h100", or "cpu:8" for simulated ones here.

    A chip alone is "v5e:1x1", "v6e:1x1" or "v5p:1x1x1". Must be called before JAX has looked for
    devices.

    Raises:
      InputError: no such topology, or its compiler is missing (libtpu, or JAX's plugin for CUDA).
    """
    match = re.fullmatch(r"(cpu):([1-9]\d*)|(\w+):(\d+(?:x\d+)+)", name)
    if name != GPU and (match is None or (match[3] and match[3] not in CHIP_GIB)):
        raise InputError(
            f"--compile_only {name!r}: expected cpu:8, {GPU}, or {', '.join(CHIP_GIB)} with a "
            "shape, like v5e:4x4 or v5p:2x2x2"
        )
    jax.config.update("jax_platforms", "cpu")
    if match and match[1]:
        jax.config.update("jax_num_cpu_devices", int(match[2]))
        return jax.devices()
    for variable, value in COMPILER_ONLY.items():
        os.environ.setdefault(variable, value)
    # Programs of absent devices can be written to JAX's persistent cache, but not read from it.
    jax.config.update("jax_enable_compilation_cache", False)
    from jax.experimental import topologies

    try:
        if name == GPU:
            config = _GPU_CONFIG.read_text(encoding="utf-8")
            how = {"target_config": config, "topology": "1x1x1"}
            return list(topologies.get_topology_desc(name, "cuda", **how).devices)
        how = {"chips_per_host_bounds": host_bounds(name)}
        return list(topologies.get_topology_desc(name, "tpu", **how).devices)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        compiler, extra = ("CUDA plugin", "cuda") if name == GPU else ("TPU compiler", "tpu")
        raise InputError(
            f"--compile_only {name}: {reason} (the {compiler} comes with "
            f"`pip install -e '.[{extra}]'`)"
        ) from None


def host_bounds(name: str) -> list[int]:
    """Chips of a host along each axis: a TPU's host has 2x2, in smaller slices no more than all.

    "v5p:2x2x2" -> [2, 2, 1], "v5e:1x1" -> [1, 1, 1].
    """
    sizes = [int(size) for size in name.partition(":")[2].split("x")]
    return [min(size, most) for size, most in zip([*sizes, 1], _HOST, strict=False)]


def chip_bytes(name: str) -> int | None:
    """Memory of one device of a topology in bytes; None where it is not known."""
    if name == GPU:
        found = re.search(r"device_memory_size: (\d+)", _GPU_CONFIG.read_text(encoding="utf-8"))
        return int(found[1]) if found else None
    chip = name.partition(":")[0]
    return CHIP_GIB[chip] * 2**30 if chip in CHIP_GIB else None
