"""Operations that XLA computes too slowly on some target, written by hand."""

from collections.abc import Sequence

# What kernels do: products of few rows on a CPU and a GPU, attention to the cache on all devices.
NAMES = ("products", "attention")


def used(without: Sequence[str] | None) -> tuple[str, ...]:
    """The kernels that are left of `NAMES`: without none (None), some, or all (no name).

    None -> ("products", "attention"); ["products"] -> ("attention",); [] -> ().
    """
    return tuple(name for name in NAMES if without is None or (without and name not in without))
