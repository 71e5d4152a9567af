"""Which kernels compute, on the devices that a program is compiled for."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from medusa_jax import kernels
from medusa_jax.model.layer_stack import in_loop

KERNELS = kernels.NAMES  # all that may be switched off
TPU_LANES = 128  # numbers of a row of a TPU's register


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """What may be computed by kernels; XLA computes the rest.

    Attributes:
      used: what they compute of `KERNELS`, where they know how.
      mesh: devices (tensor, group, copy) that hold the heads; None for one device.
    """

    used: tuple[str, ...] = ()
    mesh: Mesh | None = None

    @property
    def platform(self) -> str:
        """That of the devices."""
        return self.mesh.devices.flat[0].platform if self.mesh else jax.default_backend()

    @property
    def on_one_device(self) -> bool:
        """Whether no device holds a part of anything."""
        return self.mesh is None or self.mesh.size == 1

    @property
    def attends(self) -> bool:
        """Whether a kernel attends to the cache."""
        return "attention" in self.used

    @property
    def multiplies(self) -> bool:
        """Whether `few_rows_gpu` multiplies what it knows, and `add_norm_gpu` adds its parts."""
        return "products" in self.used and self.on_one_device and self.platform == "gpu"

    def multiplies_rows_of(self, dtype: Any) -> bool:
        """Whether `few_rows_gpu` multiplies rows of this type, by weights that it knows."""
        if not self.multiplies:
            return False
        from medusa_jax.kernels import few_rows_gpu

        return dtype in few_rows_gpu.TYPES

    def reads_projections(self, width: int) -> bool:
        """Whether a kernel attends with heads of this width that are not rotated yet."""
        knows = {"gpu": width >= 32 and width.bit_count() == 1, "tpu": width == TPU_LANES}
        return self.attends and knows.get(self.platform, False)

    def stacks_cache(self, params: Mapping[str, Any], width: int) -> bool:
        """Whether the cache of a backbone with these parameters is an array of all layers.

        A GPU's kernel reads a layer inside it, as those of a CPU do.
        """
        return in_loop(params) or (self.platform == "gpu" and self.reads_projections(width))

    def of_projections(self) -> Callable[..., Array]:
        """The kernel that reads projections."""
        if self.platform == "tpu":
            from medusa_jax.kernels import projected_attention_tpu

            return projected_attention_tpu.attention
        from medusa_jax.kernels import cache_attention_gpu

        return cache_attention_gpu.attention
