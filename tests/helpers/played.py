"""A CPU that plays a GPU or a TPU: their kernels are interpreted."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from medusa_jax.kernels import (
    add_norm_gpu,
    cache_attention_gpu,
    few_rows_gpu,
    projected_attention_tpu,
)
from medusa_jax.model.kernel_choice import KernelChoice

KERNELS = ((cache_attention_gpu, "attention"), (add_norm_gpu, "add_norm"))
KERNELS += ((projected_attention_tpu, "attention"),)
KERNELS += tuple((few_rows_gpu, name) for name in ("product", "parts"))
# A GPU that is not here, for which Pallas lowers kernels in `jax.sharding.use_abstract_mesh`.
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
ABSENT_GPU = AbstractMesh((1,), ("x",), abstract_device=H100)


def play(platform: str, patch: Callable[[Any, str, Any], None]) -> None:
    """Makes programs that are traced from now on those of a device; heads may be of any width.

    Args:
      platform: "gpu" or "tpu".
      patch: `setattr`, or the one of pytest's monkeypatch.
    """
    for module, name in KERNELS:
        patch(module, name, functools.partial(getattr(module, name), interpret=True))
    patch(few_rows_gpu, "TYPES", (jnp.float32, jnp.bfloat16))
    patch(KernelChoice, "platform", platform)
    patch(KernelChoice, "reads_projections", lambda self, _: self.attends)
