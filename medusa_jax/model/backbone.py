"""The backbone: a Llama-family decoder as a functional Flax Linen module.

`Backbone(config).apply({"params": params}, ...)` maps a block of tokens to
hidden states and to the block's own keys and values. What the block may see of
itself is a mask (causal in a prompt, ancestors in a tree); what it sees of the
past is a `KVCache`, which it only reads.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.kernels.heads import Heads
from medusa_jax.model.cache_attention import Past
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.decoder_layer import Layer, RMSNorm
from medusa_jax.model.kernel_choice import KernelChoice
from medusa_jax.model.kv_cache import Block, KVCache
from medusa_jax.model.layer_stack import STACK
from medusa_jax.model.layers import rope_tables
from medusa_jax.model.linear import parameter
from medusa_jax.model.rope import DynamicNTK
from medusa_jax.model.sight import Sight
from medusa_jax.model.weight import of_layer
from medusa_jax.shapes import typed


class Embedding(nn.Module):
    """The table of token embeddings [V, D], which a tied model also projects with.

    Attributes:
      config: shape of the backbone.
    """

    config: ModelConfig

    def setup(self) -> None:
        shape = (self.config.vocab_size, self.config.hidden_size)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        self.table = parameter(self, "embedding", shape, init)

    def __call__(self, tokens: Int[Array, "*dims"]) -> Array:
        """Rows of the table [*dims, D]."""
        return self.table.lookup(tokens)


class Backbone(nn.Module):
    """Tokens to hidden states. Parameters: a nested dict, one sub-dict a layer, "layer_0" and on.

    Where the kernels of a CPU read weights, decoding holds the layers as a stack, "layers"
    [L, ...], which a loop runs: a single layer is compiled. A tied model may hold "lm_head" too: a
    copy in the order that is fast for XLA's products.

    Attributes:
      config: shape of the backbone.
      kernels: which of them compute beside a cache.
    """

    config: ModelConfig
    kernels: KernelChoice = KernelChoice()

    def setup(self) -> None:
        config = self.config
        self.embed = Embedding(config)
        self.looped = self.has_variable("params", STACK)
        count = 0 if self.looped else config.num_layers
        self.layers = [Layer(config, name=f"layer_{i}") for i in range(count)]
        self.final_norm = RMSNorm(config.norm_eps, self.kernels.multiplies)
        self.lm_head = None
        if not config.tied or self.has_variable("params", "lm_head"):
            shape = (config.vocab_size, config.hidden_size)
            self.lm_head = parameter(self, "lm_head", shape)

    @typed
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#B T T"],
        cache: KVCache | None = None,
        lengths: Int[Array, " B"] | None = None,
        live: Bool[Array, "B T"] | None = None,
        wanted: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Block]:
        """Runs one block of tokens.

        Args:
          tokens: ids [B, T].
          positions: place of each token in its sequence, from 0 [B, T].
          mask: True where a token sees another of the same block
            ([B, T, T], or one [1, T, T] for all rows); sliding windows are applied on top.
          cache: the past, each row up to its length; None where there is none.
          lengths: of prompts that are longer than this block, or padded. Dynamic NTK turns
            all tokens of a prompt by its whole length.
          live: tokens that anything comes of; hidden states of the others are of no use. Beside
            a cache, their numbers are zeros all the way, which `kernels.few_rows` leaves out.
          wanted: live tokens whose hidden state is wanted, beside a cache. The last layer computes
            keys and values alone of the others.

        Returns:
          hidden states after the final norm [B, T, D] (the `h_t` of the paper,
          input of lm_head and Medusa heads alike), and the block's own keys and values.
        """
        if lengths is not None and isinstance(self.config.rope_scaling, DynamicNTK):
            rope = rope_tables(self.config, positions, lengths[:, None])
        elif cache is None:
            rope = rope_tables(self.config, positions)
        else:
            cos, sin = cache.rope
            rope = cos[positions], sin[positions]
        x = self.embed(tokens)
        if live is not None:
            x = jnp.where(live[..., None], x, 0)
        seen = Sight.of(self.config, positions, mask)
        run = self._in_loop if self.looped else self._one_by_one
        x, keys, values = run(x, rope, seen, cache, live, wanted)
        return self.finish(*x), Block(keys, values, rope)

    def _one_by_one(
        self, x: Array, rope: tuple[Array, Array], seen: Sight, cache: KVCache | None,
        live: Array | None, wanted: Array | None,
    ) -> tuple[tuple[Array, ...], tuple[Heads, ...], tuple[Heads, ...]]:  # fmt: skip
        keys, values, update = [], [], None
        for i, layer in enumerate(self.layers):
            only = wanted if i == len(self.layers) - 1 else None
            mask, first = seen.of_layer(i)
            past = self._past(cache, i, first, live, only)
            passed = layer.unsummed(x, update, rope, mask, past, only)
            x, update, layer_keys, layer_values = passed
            keys.append(layer_keys)
            values.append(layer_values)
        return (x,) if update is None else (x, update), tuple(keys), tuple(values)

    def _in_loop(
        self, x: Array, rope: tuple[Array, Array], seen: Sight, cache: KVCache | None,
        live: Array | None, wanted: Array | None,
    ) -> tuple[tuple[Array, ...], Heads, Heads]:  # fmt: skip
        stack, last = self.get_variable("params", STACK), self.config.num_layers - 1

        def run(x: Array, number: Array) -> tuple[Array, tuple[Heads, Heads]]:
            only = None
            if wanted is not None and live is not None:
                only = jnp.where(number == last, wanted, live)
            mask, first = seen.of_layer(number)
            past = self._past(cache, number, first, live, only)
            layer, params = Layer(self.config, parent=None), of_layer(stack, number)
            passed: Any = layer.apply({"params": params}, x, rope, mask, past, only)
            x, keys, values = passed
            return x, (keys.cut(), values.cut())

        x, block = jax.lax.scan(run, x, jnp.arange(self.config.num_layers))
        keys, values = jax.tree.map(lambda layers: jnp.swapaxes(layers, 0, 1), block)
        return (x,), keys, values

    def _past(
        self, cache: KVCache | None, number: int | Array, first: Array | None,
        live: Array | None, wanted: Array | None,
    ) -> Past | None:  # fmt: skip
        """What a layer sees of the cache, by the window's first slots."""
        if cache is None:
            return None
        keys, values, layer = cache.of_layer(number)
        filled, asked = _filled(cache, live), live if wanted is None else wanted
        return Past(keys, values, filled, first, self.kernels, cache.row, asked, layer)

    def finish(
        self, x: Float[Array, "B T D"], update: Float[Array, "*parts D"] | None = None
    ) -> Float[Array, "B T D"]:
        """Hidden states from the last layer's output, or from its sum with an update."""
        return self.final_norm.after(x, update)[1]

    def unembed(
        self, hidden: Float[Array, "*dims D"], rows: Int[Array, " W"] | None = None
    ) -> Float[Array, "*dims V"]:
        """Next-token logits, float32 [*dims, V]; with `rows`, of these tokens only [*dims, W]."""
        weight = self.embed.table if self.lm_head is None else self.lm_head
        return (weight if rows is None else weight.rows(rows)).dot(hidden)


def _filled(cache: KVCache, live: Array | None) -> Array:
    """Slots of each row that anything may come of [B]."""
    return cache.length if live is None else jnp.where(live.any(axis=1), cache.length, 0)


def causal_mask(size: int) -> Array:
    """Each token sees itself and those before it [1, T, T].

    size 3 -> rows (1 0 0), (1 1 0), (1 1 1). Prompts are padded on the right,
    so no real token ever sees padding.
    """
    return jnp.tril(jnp.ones((1, size, size), bool))
