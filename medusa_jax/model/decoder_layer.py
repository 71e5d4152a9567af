"""A decoder layer of the backbone as Linen modules: norms, attention and gated feed-forward."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from medusa_jax.kernels.heads import Heads
from medusa_jax.model.attention import attend
from medusa_jax.model.cache_attention import Past
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.kernel_choice import KernelChoice
from medusa_jax.model.layers import rms_norm
from medusa_jax.model.linear import Linear, joint_projection, projections
from medusa_jax.model.qkv import QKV


class RMSNorm(nn.Module):
    """Scale-only norm over the last axis.

    Attributes:
      eps: added to the mean square.
      kernel: whether the kernel of GPUs adds and scales.
    """

    eps: float
    kernel: bool = False

    def __call__(self, x: Array) -> Array:
        return self.after(x, None)[1]

    @nn.compact
    def after(self, x: Array, update: Array | None) -> tuple[Array, Array]:
        """The sum of both, and its norm; an update may be in parts [P, *dims, D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        if self.kernel and update is not None:
            from medusa_jax.kernels.add_norm_gpu import add_norm

            return add_norm(x, update, scale, self.eps)
        x = x if update is None else added(x, update)
        return x, rms_norm(x, scale, self.eps)


def added(x: Array, update: Array) -> Array:
    """The sum of x [*dims, D] and an update that may be in parts [P, *dims, D]."""
    return x + (update if update.ndim == x.ndim else update.sum(axis=0).astype(x.dtype))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Attributes:
      config: shape of the backbone.
      attend: mixes values; what `mask` is, is between its caller and itself.
      kernels: which of them may multiply.
    """

    config: ModelConfig
    attend: Callable[..., Array] = attend
    kernels: KernelChoice = KernelChoice()

    @nn.compact
    def __call__(
        self, x: Array, rope: tuple[Array, Array], mask: Any, past: Past | None
    ) -> tuple[Array, Heads, Heads]:
        """x [B, T, D], mask [B, T, T], past -> (out [B, T, D], keys, values of a `Block`).

        A kernel may leave out in parts [P, B, T, D].
        """
        config = self.config
        queries, keys, values = self._projected(x)
        if config.qk_norm:
            queries, keys = (
                Heads(norm(part.alone()).reshape(*x.shape[:2], -1), config.head_dim)
                for part, norm in (
                    (queries, RMSNorm(config.norm_eps, name="query_norm")),
                    (keys, RMSNorm(config.norm_eps, name="key_norm")),
                )
            )
        block = QKV(queries, keys, values, rope)
        mixed = self.attend(block, mask, past).reshape(*x.shape[:2], -1)
        how = {"kernels": self.kernels, "in_parts": True}
        out = Linear(config.hidden_size, config.out_bias, name="out", **how)(mixed)
        if config.num_heads > 2 * config.num_kv_heads:
            # A copy costs less than to hold the queries beside them until a path is known.
            keys, values = keys.cut(), values.cut()
        return out, keys, values

    def _projected(self, x: Array) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values of x, in a single array if their weights are."""
        config = self.config
        counts = config.num_heads, config.num_kv_heads, config.num_kv_heads
        features = {
            name: count * config.head_dim
            for name, count in zip(("query", "key", "value"), counts, strict=True)
        }
        joint = joint_projection(self, x, features, config.qkv_bias, kernels=self.kernels)
        if joint is None:
            apart = projections(self, x, features, config.qkv_bias)
            queries, keys, values = (Heads(flat, config.head_dim) for flat in apart)
            return queries, keys, values
        starts = itertools.accumulate(counts, initial=0)
        queries, keys, values = (
            Heads(joint, config.head_dim, start, count)
            for start, count in zip(starts, counts, strict=False)
        )
        return queries, keys, values


class MLP(nn.Module):
    """Gated feed-forward: down(silu(gate x) * up x).

    Attributes:
      config: shape of the backbone.
      kernels: which of them may multiply.
    """

    config: ModelConfig
    kernels: KernelChoice = KernelChoice()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, T, D] -> [B, T, D], or parts of it that a kernel leaves [P, B, T, D]."""
        config, kernels = self.config, self.kernels
        inputs = x, {"gate": config.ffn_size, "up": config.ffn_size}, config.mlp_bias
        inner = joint_projection(self, *inputs, kernels=kernels, gated=True)
        if inner is None:
            gate, up = projections(self, *inputs)
            inner = nn.silu(gate) * up
        how = {"kernels": kernels, "in_parts": True}
        return Linear(config.hidden_size, config.mlp_bias, name="down", **how)(inner)


class Layer(nn.Module):
    """One decoder block: x + attention(norm x), then x + mlp(norm x).

    Attributes:
      config: shape of the backbone.
      attend: of `Attention`.
    """

    config: ModelConfig
    attend: Callable[..., Array] = attend

    def __call__(
        self,
        x: Array,
        rope: tuple[Array, Array],
        mask: Any,
        past: Past | None,
        wanted: Array | None = None,
    ) -> tuple[Array, Heads, Heads]:
        """As `Attention`; of tokens that are not wanted [B, T], keys and values alone."""
        x, update, keys, values = self.unsummed(x, None, rope, mask, past, wanted)
        return added(x, update), keys, values

    @nn.compact
    def unsummed(
        self,
        x: Array,
        update: Array | None,
        rope: tuple[Array, Array],
        mask: Any,
        past: Past | None,
        wanted: Array | None = None,
    ) -> tuple[Array, Array, Heads, Heads]:
        """The same of the sum of x and an update; in the result, both are apart again.

        So a kernel adds them that computes the next norm too.
        """
        kernels = KernelChoice() if past is None else past.kernels
        norm = functools.partial(RMSNorm, self.config.norm_eps, kernels.multiplies)
        x, normed = norm(name="attention_norm").after(x, update)
        attention = Attention(self.config, self.attend, kernels, name="attention")
        out, keys, values = attention(normed, rope, mask, past)
        if wanted is not None:
            x, out = jnp.where(wanted[..., None], added(x, out), 0), None
        x, normed = norm(name="mlp_norm").after(x, out)
        return x, MLP(self.config, kernels, name="mlp")(normed), keys, values
