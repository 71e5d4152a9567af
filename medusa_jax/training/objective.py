"""One batch to the loss of a training mode, and everything that is reported about it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from medusa_jax.drafting.medusa_heads import HYDRA, HeadsConfig
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.weight import Weight, weight_of
from medusa_jax.param_paths import joined
from medusa_jax.training import lora, scanned_backbone, settings
from medusa_jax.training.heads_objective import (
    HeadsLoss,
    HeadsObjective,
    HeadsTerms,
    mean,
    weighted,
)
from medusa_jax.training.heads_objective import report as heads_report
from medusa_jax.training.losses import (
    Sums,
    cross_entropy,
    kl_divergence,
    over_chunks,
    targets_at,
)
from medusa_jax.training.mesh import sharing_rows
from medusa_jax.training.remat import Remat

Params = dict[str, Any]
Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """Sums of losses and hits over a batch, or over several.

    Attributes:
      lm: of the lm_head, offset 1.
      kl: KL to the teacher, summed over the lm_head's targets [].
      heads: of the heads.
    """

    lm: Sums
    kl: Array
    heads: HeadsTerms


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """Targets in a whole step, which its pieces are weighed by.

    Attributes:
      lm: float32 [].
      heads: of each head, float32 [M].
    """

    lm: Array
    heads: Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss as a function of what learns. Static under `jax.jit`.

    Attributes:
      model, heads: shapes.
      mode: of `settings.Config`.
      decay: head k weighs decay^k.
      distill: KL to the teacher instead of the backbone's cross-entropy.
      heads_loss: of each head.
      chunk: of `settings.Loss`.
      dtype: of the computation.
      remat: what the backward pass of a layer recomputes; None: nothing.
      adapter_scale: alpha / R, 0 without adapters.
      adapter_dropout: of the adapters' inputs.
      sharding: of hidden states, or None.
    """

    model: ModelConfig
    heads: HeadsConfig
    mode: str = "medusa1"
    decay: float = 0.8
    distill: bool = False
    heads_loss: HeadsLoss = HeadsLoss()
    chunk: int = 0
    dtype: str = "float32"
    remat: Remat | None = None
    adapter_scale: float = 0.0
    adapter_dropout: float = 0.0
    sharding: NamedSharding | None = None

    @classmethod
    def of(
        cls,
        config: settings.Config,
        model: ModelConfig,
        heads: HeadsConfig,
        sharding: NamedSharding | None = None,
    ) -> "Objective":
        """The objective of a run."""
        return cls(
            model=model,
            heads=heads,
            mode=config.mode,
            decay=config.loss.decay,
            distill=config.loss.distill,
            heads_loss=HeadsLoss(config.loss.heads, config.loss.smoothing, config.loss.eta),
            chunk=config.loss.chunk,
            dtype=config.model.dtype,
            remat=config.model.recomputed if config.mode != "medusa1" else None,
            adapter_scale=config.lora.alpha / config.lora.rank if config.adapted else 0.0,
            adapter_dropout=config.lora.dropout if config.adapted else 0.0,
            sharding=sharding,
        )

    def counts(self, batch: Batch) -> Counts:
        """Targets of a step's arrays [A, B, T]."""
        keys = ("tokens", "segments", "learnt")
        rows = {key: batch[key].reshape(-1, batch[key].shape[-1]) for key in keys}

        def count(offset: int) -> Array:
            return jnp.sum(_targets(rows, offset)[1]).astype(jnp.float32)

        heads = [count(k + 2) for k in range(self.heads.num_heads)]
        return Counts(count(1), jnp.stack(heads) if heads else jnp.zeros(0))

    def loss(
        self,
        trainable: Params,
        frozen: Params,
        batch: Batch,
        counts: Counts,
        heads_weight: Array | float,
        key: Array | None = None,
        with_lm: Array | bool = True,
    ) -> tuple[Array, Terms]:
        """This batch's part of a step's loss, and its terms.

        Args:
          trainable, frozen: nested parameters that together make up the model.
          batch: arrays [B, T] of `packing.row`; with `hidden` [B, T, D], no backbone is computed.
          counts: targets in the whole step: parts of its loss add up to it.
          heads_weight: lambda_0 (Medusa-2 only).
          key: for the adapters' dropout; None for none.
          with_lm: see `terms`.
        """
        terms = self.terms(trainable, frozen, batch, key, with_lm)
        weights = self.decay ** jnp.arange(1.0, self.heads.num_heads + 1.0)
        heads_loss = jnp.sum(weights * terms.heads.learnt / jnp.maximum(counts.heads, 1.0))
        if self.mode == "medusa1":
            return heads_loss, terms
        backbone_loss = (terms.kl if self.distill else terms.lm.loss) / jnp.maximum(counts.lm, 1.0)
        return backbone_loss + heads_weight * heads_loss, terms

    def terms(
        self,
        trainable: Params,
        frozen: Params,
        batch: Batch,
        key: Array | None = None,
        with_lm: Array | bool = True,
    ) -> Terms:
        """Sums over the batch's targets [B, T], the losses with their gradients.

        Args:
          with_lm: whether Medusa-1, which does not learn from it, computes the lm_head's loss;
            if not, its sums are zero.
        """
        dtype = jnp.dtype(self.dtype)
        params = joined(jax.tree.map(lambda leaf: leaf.astype(dtype), trainable), frozen)
        student, teacher = params["backbone"], params.get("teacher", params["backbone"])
        if "adapters" in params:
            student = lora.attached(
                student, params["adapters"], self.adapter_scale, self.adapter_dropout, key
            )
        chunk = rows_chunk(self.chunk, batch["tokens"].shape[0], self.sharding)
        hidden, theirs = self._hidden(student, batch), ()
        if self.distill:
            theirs = (jax.lax.stop_gradient(self._hidden(teacher, batch)),)
        projection = _projection(student)
        projections = (projection, _projection(teacher)) if self.distill else (projection,)

        def lm() -> tuple[Sums, Array]:
            targets, counted = _targets(batch, offset=1)
            arrays = hidden, counted, targets, *theirs
            return _lm_losses(chunk, self.sharding, projections, *arrays)

        if self.mode == "medusa1":
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(lm))
            lm_sums, kl = jax.lax.cond(with_lm, lm, lambda: nothing)
        else:
            lm_sums, kl = lm()
        if self.heads.truncated:
            projection = projection.rows(params["heads"]["token_map"])
        embedding = None
        if self.heads.selector or self.heads.architecture == HYDRA:
            embedding = jax.lax.stop_gradient(weight_of(student["embed"]["embedding"]))
        ours = HeadsObjective(
            self.heads, self.model.vocab_size, self.heads_loss, chunk, self.sharding
        )
        heads = ours.terms(params.get("heads", {}), projection, embedding, hidden, batch)
        return Terms(lm_sums, kl, heads)

    def _hidden(self, backbone: Params, batch: Batch) -> Array:
        if "hidden" in batch:  # kept from an earlier pass (`hidden_states.py`)
            return batch["hidden"].astype(self.dtype)
        return scanned_backbone.hidden_states(
            self.model, backbone, batch, remat=self.remat, sharding=self.sharding
        )


def rows_chunk(chunk: int, rows: int, sharding: NamedSharding | None = None) -> int:
    """Positions of each row whose logits exist at a time, 0 for all.

    chunk 512: 128 of each of 4 rows; 256 where two devices share them.
    """
    ways = 1 if sharding is None else sharing_rows(sharding.mesh)
    return chunk and max(1, chunk * ways // rows)


def _projection(backbone: Params) -> Weight:
    """The lm_head, which in a tied model is the embedding."""
    tied = "lm_head" not in backbone
    return weight_of(backbone["embed"]["embedding"] if tied else backbone["lm_head"])


def _lm_losses(
    chunk: int,
    sharding: NamedSharding | None,
    projections: tuple[Weight, ...],
    hidden: Array,
    counted: Array,
    targets: Array,
    *theirs: Array,
) -> tuple[Sums, Array]:
    """The lm_head's sums, and KL to the teacher; that of both which is learnt from has gradients.

    Args:
      projections: of the student and, with `theirs`, of the teacher.
      theirs: the teacher's hidden states [B, T, D], or nothing.
    """

    def losses(params: Any, hidden: Array, counted: Array, arrays: Any) -> Any:
        targets, *theirs = arrays
        ours = params[0].dot(hidden)
        sums = cross_entropy(ours, targets, counted)
        if not theirs:
            return sums.loss, sums, ()
        return kl_divergence(params[1].dot(theirs[0]), ours, counted), sums, ()

    arrays = targets, *theirs
    loss, sums, _ = over_chunks(losses, chunk, projections, hidden, counted, arrays, sharding)
    if theirs:
        return sums, loss
    return dataclasses.replace(sums, loss=loss), jnp.zeros(())


def _targets(batch: Batch, offset: int) -> tuple[Array, Array]:
    return targets_at(batch["tokens"], batch["segments"], batch["learnt"], offset)


def report(terms: Terms, heads_weight: float, objective: Objective) -> dict[str, Any]:
    """Means of a step's terms, named for `metrics.jsonl`; values are floats or lists of them."""
    out: dict[str, Any] = {
        "lm_loss": mean(terms.lm.loss, terms.lm.count),
        "lm_top1": mean(terms.lm.hits[0], terms.lm.count),
    }
    backbone_loss = out["lm_loss"]
    if objective.distill:
        out["kl"] = backbone_loss = mean(terms.kl, terms.lm.count)
    out |= heads_report(terms.heads, objective.decay)
    pairs = zip(terms.heads.learnt, terms.heads.heads, strict=True)
    learnt = weighted([mean(loss, head.count) for loss, head in pairs], objective.decay)
    out["loss"] = learnt
    if objective.mode != "medusa1":
        out["loss"] = backbone_loss + heads_weight * learnt
    out["targets"] = int(terms.lm.count)
    return out
