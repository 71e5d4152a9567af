"""A CPU that plays a GPU: its kernels are interpreted."""

import functools
from collections.abc import Callable
from typing import Any

from medusa_jax.kernels import add_norm_gpu, cache_attention_gpu
from medusa_jax.model.kernel_choice import KernelChoice


def play(patch: Callable[[Any, str, Any], None]) -> None:
    """Makes programs that are traced from now on those of a GPU; heads may be of any width.

    Args:
      patch: `setattr`, or the one of pytest's monkeypatch.
    """
    for module, name in ((cache_attention_gpu, "attention"), (add_norm_gpu, "add_norm")):
        patch(module, name, functools.partial(getattr(module, name), interpret=True))
    patch(KernelChoice, "platform", "gpu")
    patch(KernelChoice, "reads_projections", lambda self, _: self.used)
