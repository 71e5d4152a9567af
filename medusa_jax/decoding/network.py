"""The backbone as decoding calls it: suppressed tokens, and results placed on a mesh."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.drafting.drafter import Params
from medusa_jax.model.backbone import Backbone
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.kernel_choice import KERNELS, KernelChoice
from medusa_jax.model.kv_cache import Block, KVCache, cache_axes, init_cache
from medusa_jax.model.weight import leaves_out_zeros, quantized, weight_of
from medusa_jax.param_paths import map_with_path

# XLA's products of a single row by wide weights take longer on a GPU than those of four rows: on an
# H200 a plain step of Llama-2-7B took 5.0 ms, and takes 3.9.
LEAST_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Network:
    """A backbone and what every pass of it obeys.

    Attributes:
      config: shape of the backbone.
      suppress: token ids that are never produced.
      mesh: the devices that share the work; None for one device.
      kernels: what kernels compute where there are any, of `KERNELS`.
    """

    config: ModelConfig
    suppress: tuple[int, ...] = ()
    mesh: Mesh | None = None
    kernels: tuple[str, ...] = KERNELS

    def bound(self, params: Params) -> Backbone:
        """The backbone with its parameters, as a drafter gets it."""
        return self._backbone.bind({"params": params["backbone"]})

    @property
    def _backbone(self) -> Backbone:
        return Backbone(self.config, KernelChoice(self.kernels, self.mesh))

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#B T T"],
        past: KVCache | None,
        lengths: Int[Array, " B"] | None = None,
        live: Bool[Array, "B #T"] | None = None,
        wanted: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Block]:
        """`Backbone.__call__`, its hidden states whole on each device of the mesh."""
        if live is not None:
            # Elsewhere nothing is saved, nor where a single row runs: ended, it takes no step.
            saves = live.size > 1 and leaves_out_zeros(params["backbone"])
            live = jnp.broadcast_to(live, tokens.shape) if saves else None
        count = tokens.shape[1]
        if past is not None and (fill := self._missing(params, tokens)):
            tokens, positions, mask = _with_more(tokens, positions, mask, fill)
        inputs = tokens, positions, mask, past, lengths, live, None if live is None else wanted
        variables = {"params": params["backbone"]}
        passed: Any = self._backbone.apply(variables, *inputs)
        hidden, block = passed
        # A split of D would travel to all earlier layers, with two more collectives in each.
        return self.placed(hidden[:, :count]), block.begin(count)

    def _missing(self, params: Params, tokens: Array) -> int:
        """Tokens that each row [B, T] lacks for XLA's products of as many rows as are fast."""
        kernels = self._backbone.kernels
        by_xla = kernels.platform == "gpu" and not kernels.multiplies_rows_of(precision(params))
        least = LEAST_ROWS if by_xla and not quantized(params["backbone"]) else 1
        return max(0, -(-least // len(tokens)) - tokens.shape[1])

    def logits(self, params: Params, hidden: Float[Array, "*dims D"]) -> Float[Array, "*dims V"]:
        """Logits of the next token, float32, as the model has them."""
        variables = {"params": params["backbone"]}
        logits: Any = Backbone(self.config).apply(variables, hidden, method="unembed")
        return logits

    def allowed(self, logits: Float[Array, "*dims V"]) -> Float[Array, "*dims V"]:
        """Logits with -inf for suppressed tokens."""
        if self.suppress:
            logits = logits.at[..., np.array(self.suppress)].set(-jnp.inf)
        return logits

    def empty_cache(self, params: Params, rows: int, slots: int) -> KVCache:
        """The cache of so many rows and slots, in the type of hidden states."""
        width = self.config.head_dim
        stacked = self._backbone.kernels.stacks_cache(params["backbone"], width)
        return init_cache(self.config, rows, slots, precision(params), stacked)

    def places(self, tree: Any) -> Any:
        """Shardings of a `State` or `Emitted`: keys and values by heads, the rest replicated."""
        mesh = self.mesh
        assert mesh is not None

        def place(path: str, leaf: Any) -> NamedSharding:
            heads = re.search(r"cache/(keys|values)(/|$)", path)
            return NamedSharding(mesh, cache_axes(leaf.ndim) if heads else P())

        return map_with_path(place, tree)

    def abstract(self, shapes: Any) -> Any:
        """Abstract arrays with these shardings, to compile for."""
        if self.mesh is None:
            return shapes
        places = self.places(shapes)
        return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)

    def placed(self, tree: Any) -> Any:
        """The tree with these shardings, inside a compiled function."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.places(tree))


def _with_more(
    tokens: Array, positions: Array, mask: Array, fill: int
) -> tuple[Array, Array, Array]:
    """So many more tokens in each row, which see what the last one sees and which none sees.

    Tokens (5 7), mask rows (1 0) and (1 1), fill 1 -> tokens (5 7 7), mask rows (1 0 0), (1 1 0)
    and (1 1 0).
    """
    behind = (0, 0), (0, fill)
    tokens, positions = (jnp.pad(row, behind, mode="edge") for row in (tokens, positions))
    mask = jnp.pad(jnp.pad(mask, (*behind, (0, 0)), mode="edge"), ((0, 0), *behind))
    return tokens, positions, mask


def precision(params: Params) -> jnp.dtype:
    """The type of hidden states, keys and values: that of the embeddings."""
    return weight_of(params["backbone"]["embed"]["embedding"]).dtype
