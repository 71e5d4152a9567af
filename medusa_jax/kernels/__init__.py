"""Operations that XLA computes too slowly on some target, written by hand."""

from collections.abc import Sequence

# What kernels do: products of few rows on a CPU, attention to the cache on all devices.
NAMES = ("products", "attention")


def used(without: Sequence[str] | None) -> set[str]:
    """The kernels that are left of `NAMES`: without none (None), some, or all (no name).

    None -> {"products", "attention"}; ["products"] -> {"attention"}; [] -> {}.
    """
    return set(NAMES) - set(NAMES if without == [] else without or ())
