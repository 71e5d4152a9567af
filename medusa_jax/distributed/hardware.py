"""What is known of a device: its name, its memory and the bandwidth of that."""

import os
import platform
import re
from pathlib import Path

import jax

# Peak memory bandwidth in bytes per second, by a part of JAX's `device_kind`; data sheets.
BANDWIDTH = {
    "H200": 4.8e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100 80GB": 1.935e12,
    "A100": 1.555e12,
    "B200": 8.0e12,
    "L40S": 0.864e12,
    "TPU v4": 1.228e12,
    "TPU v5 lite": 0.819e12,
    "TPU v5e": 0.819e12,
    "TPU v5": 2.765e12,
    "TPU v6": 1.64e12,
    "TPU7x": 7.38e12,
}


def device_bandwidth(kind: str | None = None) -> float | None:
    """Bytes per second of this process's device, None where it is not known (CPUs)."""
    kind = kind or jax.devices()[0].device_kind
    return next((bytes_s for name, bytes_s in BANDWIDTH.items() if name in kind), None)


def memory_bytes() -> int:
    """Memory of this process's device; on a CPU, of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit", machine)


def accelerated() -> bool:
    """Whether JAX computes on a GPU or TPU."""
    return jax.default_backend() != "cpu"


def device() -> str:
    """This process's kind of device; of a CPU its model, and how many cores there are."""
    if accelerated():
        return jax.devices()[0].device_kind
    return f"cpu {cpu()} {os.cpu_count()}"


def cpu() -> str:
    """This machine's processor by name, as far as it is known."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or "cpu"
