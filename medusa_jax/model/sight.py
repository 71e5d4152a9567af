"""What the tokens of a block see of it and of the cache, where layers have sliding windows."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from medusa_jax.model.config import ModelConfig
from medusa_jax.model.layers import first_within_window, within_window


@dataclasses.dataclass(frozen=True)
class Sight:
    """What the tokens of a block see, by the sliding window of a layer.

    Attributes:
      which: number of each layer's window among the W that the layers have, L numbers.
      masks: whether a token sees another of its block, for each window [B, T, T].
      first: the first position that each token sees, for each window [B, T]; None for no window.
    """

    which: tuple[int, ...]
    masks: list[Array]
    first: list[Array | None]

    @classmethod
    def of(cls, config: ModelConfig, positions: Array, mask: Array) -> "Sight":
        """Windows on top of a mask."""
        windows = list(dict.fromkeys(config.windows))
        masks = [mask & within_window(positions, positions, window) for window in windows]
        first = [first_within_window(positions, window) for window in windows]
        return cls(tuple(windows.index(window) for window in config.windows), masks, first)

    def of_layer(self, number: int | Array) -> tuple[Array, Array | None]:
        """Of a layer whose number may be known to the program alone."""
        if len(self.masks) == 1:
            return self.masks[0], self.first[0]
        if isinstance(number, int):
            return self.masks[self.which[number]], self.first[self.which[number]]
        which = jnp.array(self.which)[number]
        first = [jnp.zeros(()) if one is None else one for one in self.first]
        first = jnp.stack(jnp.broadcast_arrays(*first)).astype(jnp.int32)
        return jnp.stack(self.masks)[which], first[which]
