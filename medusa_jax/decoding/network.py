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

from medusa_jax.distributed.rules import CACHE
from medusa_jax.drafting.drafter import Params
from medusa_jax.model.backbone import Backbone
from medusa_jax.model.cache_attention import CacheAttention
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.kv_cache import Block, KVCache
from medusa_jax.model.linear import leaves_out_zeros, weight_of
from medusa_jax.param_paths import map_with_path


@dataclasses.dataclass(frozen=True)
class Network:
    """A backbone and what every pass of it obeys.

    Attributes:
      config: shape of the backbone.
      suppress: token ids that are never produced.
      mesh: the devices that share the work; None for one device.
      kernels: attention to the cache is computed by a kernel where there is one.
    """

    config: ModelConfig
    suppress: tuple[int, ...] = ()
    mesh: Mesh | None = None
    kernels: bool = True

    def bound(self, params: Params) -> Backbone:
        """The backbone with its parameters, as a drafter gets it."""
        return self._backbone.bind({"params": params["backbone"]})

    @property
    def _backbone(self) -> Backbone:
        return Backbone(self.config, CacheAttention(self.kernels, self.mesh))

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
        inputs = tokens, positions, mask, past, lengths, live, None if live is None else wanted
        variables = {"params": params["backbone"]}
        passed: Any = self._backbone.apply(variables, *inputs)
        hidden, block = passed
        # A split of D would travel to all earlier layers, with two more collectives in each.
        return self.placed(hidden), block

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

    def places(self, tree: Any) -> Any:
        """Shardings of a `State` or `Emitted`: keys and values by heads, the rest replicated."""
        assert self.mesh is not None
        heads, whole = NamedSharding(self.mesh, CACHE), NamedSharding(self.mesh, P())
        return map_with_path(
            lambda path, _: heads if re.search("cache/(keys|values)/", path) else whole, tree
        )

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


def precision(params: Params) -> jnp.dtype:
    """The type of hidden states, keys and values: that of the embeddings."""
    return weight_of(params["backbone"]["embed"]["embedding"]).dtype
