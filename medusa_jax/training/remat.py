"""What the backward pass of a layer finds again, and what it recomputes (activation checkpointing).

To recompute a layer is its whole forward pass once more: with adapters, a quarter of a step's
products. What is kept costs memory: of a device, or of its host, where it crosses the link between
both twice.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

INPUT = "input"  # of a layer
PRODUCTS = ("query", "key", "value", "out", "gate", "up", "down")  # of a layer's weights


@dataclasses.dataclass(frozen=True)
class Remat:
    """Arrays of a layer that are not recomputed, by the names that they have in it.

    A layer's input is kept on the device unless it is offloaded.

    Attributes:
      kept: on the device, of `PRODUCTS`.
      offloaded: in the memory of its host, of these and `INPUT`.
    """

    kept: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()

    def applied(self, run_layer: Callable[..., Any]) -> Callable[..., Any]:
        """A layer, run in a loop, that recomputes all else in its backward pass."""
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(self.kept),
            names_which_can_be_offloaded=list(self.offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
        return jax.checkpoint(run_layer, prevent_cse=False, policy=policy)
