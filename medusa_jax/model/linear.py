"""Linear layers of a module, whose weights lie in whatever layout its parameters hold them."""

import itertools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from medusa_jax.model.kernel_choice import KernelChoice
from medusa_jax.model.weight import Weight, weight_of

# Lecun's normal initializer for weights [out, in].
weight_init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)


def parameter(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    init: nn.initializers.Initializer = weight_init,
) -> Weight:
    """A module's weight of shape [..., out, in], in whatever layout its parameters hold it."""
    if module.has_variable("params", name):  # `param` would compare an [in, out] leaf with `shape`
        return weight_of(module.get_variable("params", name))
    return weight_of(module.param(name, init, shape))


class Linear(nn.Module):
    """W x + b, or of a stack the W_m x_m + b_m of M heads.

    Attributes:
      features: out.
      use_bias: whether there is a b.
      stack: (M,) for the weights of M heads; () for a single weight.
      kernel_init: initializer of W.
      kernels: which of them may compute it.
      gated: the outputs are those of G, then those of U, and the result is silu(G x) * U x.
      in_parts: a kernel may leave parts [P, *dims, out] that the result is the sum of.
    """

    features: int
    use_bias: bool = False
    stack: tuple[int, ...] = ()
    kernel_init: nn.initializers.Initializer = weight_init
    kernels: KernelChoice = KernelChoice()
    gated: bool = False
    in_parts: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.stack, self.features, x.shape[-1])
        weight = parameter(self, "weight", shape, self.kernel_init)
        y = self._by_kernel(x, weight)
        if y is not None:
            return y
        y = weight.dot(x).astype(x.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (*self.stack, self.features))
        # Training may keep it for the backward pass (`settings.Backbone.kept`).
        y = checkpoint_name(y, self.name or "")
        if self.gated:
            gate, up = jnp.split(y, 2, axis=-1)
            y = nn.silu(gate) * up
        return y

    def _by_kernel(self, x: Array, weight: Weight) -> Array | None:
        """The result by a GPU's kernel; None where it does not know the weight or so many rows."""
        if not self.kernels.multiplies or self.use_bias or not weight.bare:
            return None
        from medusa_jax.kernels import few_rows_gpu

        if not few_rows_gpu.knows(x, weight.data, gated=self.gated):
            return None
        if self.in_parts:
            return few_rows_gpu.parts(x, weight.data, weight.scale)
        return few_rows_gpu.product(x, weight.data, weight.scale, gated=self.gated)


def projections(
    module: nn.Module, x: Array, features: dict[str, int], use_bias: bool = False
) -> list[Array]:
    """A module's linear layers of one input x [*dims, in]; each [*dims, out].

    Args:
      features: out of each layer, by name.
    """
    y = joint_projection(module, x, features, use_bias)
    if y is None:
        return [Linear(out, use_bias, name=name)(x) for name, out in features.items()]
    return jnp.split(y, list(itertools.accumulate(features.values()))[:-1], axis=-1)


def joint_projection(
    module: nn.Module, x: Array, features: dict[str, int], use_bias: bool = False, **how: Any
) -> Array | None:
    """The outputs of `projections` behind each other [*dims, sum of out], if held so; else None.

    Decoding may hold their weights as those of a single layer, whose name is `joint_name`: a
    product of all outputs starts once and reads x once.

    Args:
      how: further attributes of this layer.
    """
    whole = joint_name(features)
    if not module.has_variable("params", whole):
        return None
    return Linear(sum(features.values()), use_bias, name=whole, **how)(x)


def joint_name(names: Iterable[str]) -> str:
    """What a layer is called that does the work of several: ("gate", "up") -> "gate_up"."""
    return "_".join(names)
