"""Which kernels compute, on the devices that a program is compiled for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from medusa_jax.model.layer_stack import in_loop


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """What may be computed by kernels; XLA computes the rest.

    Attributes:
      used: kernels compute what they know.
      mesh: devices (tensor, group, copy) that hold the heads; None for one device.
    """

    used: bool = False
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
    def adds_norms(self) -> bool:
        """Whether `add_norm_gpu` adds rows and computes the norm of their sum."""
        return self.used and self.on_one_device and self.platform == "gpu"

    def reads_projections(self, width: int) -> bool:
        """Whether `cache_attention_gpu` attends with heads of this width.

        It reads a block as the projections leave it, and a layer inside the cache of all layers.
        """
        return self.used and self.platform == "gpu" and width >= 32 and width.bit_count() == 1

    def stacks_cache(self, params: Mapping[str, Any], width: int) -> bool:
        """Whether the cache of a backbone with these parameters is an array of all layers."""
        return in_loop(params) or self.reads_projections(width)
