"""The heads' part of a loss: what each of them learns, and what is reported of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from medusa_jax.drafting import selector
from medusa_jax.drafting.hydra_heads import HydraHead, head_input
from medusa_jax.drafting.medusa_heads import HYDRA, Head, HeadsConfig, rows_of
from medusa_jax.model.weight import Weight
from medusa_jax.training import selector_loss
from medusa_jax.training.head_losses import (
    accepted_lengths,
    lk_hybrid,
    pace_weights,
    soft_cross_entropy,
    total_variation,
)
from medusa_jax.training.losses import MISS, TOP, Sums, each_target, over_chunks, targets_at
from medusa_jax.training.mesh import held_back, put_together

TEACHER = ("teacher", "tv", "lk_hybrid")  # losses that read the backbone's distribution
EAL = ("eal", "selector_eal")  # expected accepted lengths in reports

Params = dict[str, Any]
Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadsTerms:
    """Sums over a batch, or over several.

    Attributes:
      learnt: the loss that each head, and the selector after it, learns from [M]; has gradients.
      heads: cross-entropy and hits of each head.
      selector: the same of the candidates that the selector scores after the token before; or ().
      accepted: lengths accepted by trees of the best 1, 3, ... guesses [1, len(TOP)]; with a
        selector, also of guesses in its order [2, len(TOP)].
      chains: positions where all heads have a target [].
    """

    learnt: Array
    heads: tuple[Sums, ...]
    selector: tuple[Sums, ...]
    accepted: Array
    chains: Array


@dataclasses.dataclass(frozen=True)
class HeadsLoss:
    """The loss of each head: `heads`, `smoothing` and `eta` of `settings.Loss`."""

    kind: str = "ce"
    smoothing: float = 0.5
    eta: float = 3.0


@dataclasses.dataclass(frozen=True)
class HeadsObjective:
    """What heads learn. Static under `jax.jit`.

    Attributes:
      config: their shape.
      vocab_size: V.
      loss: of each head.
      chunk: positions of a row whose logits exist at a time, 0 for all.
      sharding: of hidden states, or None.
    """

    config: HeadsConfig
    vocab_size: int
    loss: HeadsLoss
    chunk: int = 0
    sharding: NamedSharding | None = None

    def terms(
        self, heads: Params, projection: Weight, embedding: Any, hidden: Array, batch: Batch
    ) -> HeadsTerms:
        """The sums over a batch.

        Args:
          projection: for shared heads, of the tokens that they guess among; also the backbone's
            own, whose distribution some losses learn.
          embedding: `Weight` of all tokens, for Hydra heads and for the selector; else None.
          hidden: [B, T, D].
          batch: arrays [B, T] of `packing.row`.
        """
        numbers = range(self.config.num_heads)
        if not numbers:
            nothing = jnp.zeros((1, len(TOP)))
            return HeadsTerms(jnp.zeros(0), (), (), nothing, jnp.zeros(()))
        given = [self._given(k, heads, hidden, batch) for k in numbers]
        counted = jnp.stack([_targets(batch, k)[1] for k in numbers])
        if self.loss.kind == "d_pace":
            weights = self._pace(heads, projection, embedding, hidden, given, counted)
            given = [one | {"weights": weights[k]} for k, one in enumerate(given)]
        learned: Params = {}
        if self.config.selector:
            token_map = heads.get("token_map")
            learned = selector_loss.with_table(heads[selector.NAME], embedding, token_map)
        if self.config.shared or self.loss.kind in TEACHER:
            projection = put_together(projection, self.sharding)
        results: list[Any] = []
        for k in numbers:
            function = functools.partial(self._losses, k)
            # One after the other, or weights and gradients of all heads would be there at once.
            before = jax.lax.stop_gradient(results[-1:])
            own, hidden = held_back((heads[f"head_{k}"], hidden), before)
            params = put_together(own, self.sharding), projection, learned, embedding
            results.append(self._over(function, params, hidden, counted[k], given[k]))
        learnt, sums, ranks = zip(*results, strict=True)
        everywhere = counted.all(axis=0)

        def accepted(name: str) -> Array:
            every = jnp.stack([one[name] for one in ranks])
            lengths = [jnp.where(everywhere, accepted_lengths(every, k), 0) for k in TOP]
            return jnp.stack([jnp.sum(one).astype(jnp.float32) for one in lengths])

        names = ["heads", "selector"] if self.config.selector else ["heads"]
        return HeadsTerms(
            jnp.stack(learnt),
            tuple(one["heads"] for one in sums),
            tuple(one["selector"] for one in sums if "selector" in one),
            jnp.stack([accepted(name) for name in names]),
            jnp.sum(everywhere).astype(jnp.float32),
        )

    def _over(
        self, function: Any, params: Any, hidden: Array, counted: Array, given: Batch
    ) -> tuple[Array, Any, Any]:
        return over_chunks(
            function, self.chunk, params, hidden, counted, given, sharding=self.sharding
        )

    def _given(self, k: int, heads: Params, hidden: Array, batch: Batch) -> Batch:
        """What the loss of head k (0-based) reads of each position, arrays [B, T, ...]."""
        targets, _ = _targets(batch, k)
        if self.config.truncated:
            targets = rows_of(targets, heads["token_map"], self.vocab_size)
        given = {"targets": targets}
        if self.loss.kind in TEACHER:
            given["teacher"] = jax.lax.stop_gradient(_ahead(hidden, k + 1))
        if self.config.selector:
            given["before"] = _ahead(batch["tokens"], k + 1)
        if self.config.architecture == HYDRA:
            between = [_ahead(batch["tokens"], offset) for offset in range(1, k + 2)]
            given["drafted"] = jnp.stack(between, axis=-1)
        return given

    def _pace(
        self, heads: Params, projection: Weight, embedding: Any, hidden: Array,
        given: list[Batch], counted: Array,
    ) -> Array:  # fmt: skip
        """D-PACE's weights [M, B, T], by one more pass through the heads."""

        def losses(params: Any, hidden: Array, counted: Array, given: Batch) -> Any:
            own, shared, embedding = params
            logits = self._logits(own, shared, embedding, hidden, given)
            loss, rank = each_target(logits, given["targets"])
            return jnp.zeros(()), (), jnp.where(rank == MISS, jnp.inf, loss)

        found = []
        for k, one in enumerate(given):
            params = jax.lax.stop_gradient((heads[f"head_{k}"], projection, embedding))
            fixed = jax.lax.stop_gradient(hidden)
            found.append(self._over(losses, params, fixed, counted[k], one)[2])
        return pace_weights(jnp.stack(found), counted, self.loss.smoothing)

    def _logits(
        self, own: Params, shared: Weight, embedding: Any, hidden: Array, given: Batch
    ) -> Array:
        head, x = Head(self.config), hidden
        if self.config.architecture == HYDRA:
            head, x = HydraHead(self.config), head_input(x, embedding.lookup(given["drafted"]))
        logits: Any = head.apply({"params": own}, x, shared.dot)
        return logits

    def _losses(self, k: int, params: Any, hidden: Array, counted: Array, given: Batch) -> Any:
        """What head k learns of some positions, its sums, and the ranks of its targets [B, t]."""
        own, shared, learned, embedding = params
        logits = self._logits(own, shared, embedding, hidden, given)
        loss, rank = each_target(logits, given["targets"])
        known = counted & (rank < MISS)
        learnt = self._learnt(loss, logits, shared, given)
        value = jnp.sum(jnp.where(known, learnt, 0.0))
        sums, ranks = {"heads": Sums.of(loss, rank, counted)}, {"heads": rank}
        if learned:
            before = embedding.lookup(given["before"])
            own = selector_loss.of_head(learned, k, self.config.num_heads)
            loss, rank = selector_loss.chosen(own, logits, hidden, before, given["targets"])
            sums["selector"], ranks["selector"] = Sums.of(loss, rank, counted), rank
            value += sums["selector"].loss
        return value, sums, ranks

    def _learnt(self, loss: Array, logits: Array, shared: Weight, given: Batch) -> Array:
        """What a head learns of each position [B, t]; `loss` is its cross-entropy."""
        if self.loss.kind == "d_pace":
            return loss * given["weights"]
        if self.loss.kind == "ce":
            return loss
        teacher = jax.lax.stop_gradient(shared.dot(given["teacher"]))
        if self.loss.kind == "teacher":
            return soft_cross_entropy(teacher, logits)
        if self.loss.kind == "tv":
            return total_variation(teacher, logits)
        return lk_hybrid(teacher, logits, self.loss.eta)


def _targets(batch: Batch, k: int) -> tuple[Array, Array]:
    """Of head k (0-based)."""
    return targets_at(batch["tokens"], batch["segments"], batch["learnt"], k + 2)


def _ahead(array: Array, offset: int) -> Array:
    """What lies `offset` positions on [B, T, ...]; zeros behind the end."""
    width = ((0, 0), (0, offset), *((0, 0),) * (array.ndim - 2))
    return jnp.pad(array, width)[:, offset:]


def report(terms: HeadsTerms, decay: float) -> dict[str, Any]:
    """Means of the heads' terms, named for `metrics.jsonl`; values are floats or lists of them.

    `eal` is the expected accepted length: the mean of 1 + the accepted guesses, over positions
    where all heads have a target, of the chain and of trees with all of the best 3, 5, 10 guesses.
    """
    out: dict[str, Any] = {}
    for name, every in (("head", terms.heads), ("selector", terms.selector)):
        if not every:
            continue
        losses = [mean(one.loss, one.count) for one in every]
        out[f"{name}_loss"] = weighted(losses, decay)
        out[f"{name}_losses"] = losses
        for place, k in enumerate(TOP):
            out[f"{name}_top{k}"] = [mean(one.hits[place], one.count) for one in every]
    if terms.heads:
        for name, accepted in zip(EAL, terms.accepted, strict=False):
            out[name] = [1.0 + mean(one, terms.chains) for one in accepted]
    return out


def weighted(losses: list[float], decay: float) -> float:
    """The sum of the heads' losses, head k (1-based) times decay^k."""
    return sum(decay**k * loss for k, loss in enumerate(losses, start=1))


def mean(value: Any, count: Any) -> float:
    """value / count, 0 where there is nothing."""
    return float(value) / max(float(count), 1.0)
