"""What decoding carries from step to step, and what it leaves behind. Letters: see `shapes.py`."""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from medusa_jax.decoding.logprobs import Logprobs, TextLogprobs, text_logprobs
from medusa_jax.decoding.repetition import Repetition
from medusa_jax.decoding.sampling import Sampling
from medusa_jax.model.kv_cache import KVCache
from medusa_jax.param_paths import map_with_path

RUNNING, STOP, LENGTH, FAILED = 0, 1, 2, 3
FINISH_REASONS = ("running", "stop", "length", "failed")
# Leaves of a state that all rows share: those of caches.
_SHARED = re.compile("(^|/)rope/")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A batch in the middle of decoding. `step` donates it: keep no reference to an old one.

    Attributes:
      cache: keys and values of the tokens of `sequence` up to `cache.length`.
      sequence: prompt, then text [B, S].
      root: the next token, chosen but not yet in the cache [B].
      draft: what the drafter knows; a pytree with leading dimension B.
      keys: one PRNG key a row [B].
      prompt_length: tokens of the prompt [B].
      limit: length of `sequence` at which a row ends [B].
      stop_ids: tokens that end a row, kept as its last token; -1 ends none [B, Q].
      finish: RUNNING, STOP, LENGTH, or FAILED: the logits of its root were not finite [B].
      steps: steps taken while running [B].
      drafts: of them, steps that verified a tree [B].
      drafted: tokens that those steps verified, beside their roots [B].
      tokens_per_step: tokens accepted in each, root included, before any cut at
        a stop token or the limit [B, S].
      repetition: penalties of the rows, or None where no row has any.
      sampling: settings of the rows, or None where the acceptance scheme has those of all.
      logprobs: log-probabilities of the texts, or None where the decoder keeps none.
    """

    cache: KVCache
    sequence: Array
    root: Array
    draft: Any
    keys: Array
    prompt_length: Array
    limit: Array
    stop_ids: Array
    finish: Array
    steps: Array
    drafts: Array
    drafted: Array
    tokens_per_step: Array
    repetition: Repetition | None = None
    sampling: Sampling | None = None
    logprobs: Logprobs | None = None


def map_rows(function: Callable[..., Array], tree: Any, *others: Any) -> Any:
    """`jax.tree.map` over what belongs to rows; tables that rows share are those of the first."""

    def mapped(path: str, leaf: Array, *rest: Array) -> Array:
        return leaf if _SHARED.search(path) else function(leaf, *rest)

    return map_with_path(mapped, tree, *others)


def free(state: State, slot: Array) -> State:
    """Ends a row: it takes no further step, and another may take its place."""
    return dataclasses.replace(state, finish=state.finish.at[slot].set(STOP))


def regrouped(state: State, rows: Array, empty: State) -> State:
    """These rows of a batch, with as many cache slots as before or more.

    Of rows (a, b, c), rows (2, 0, -1) -> c, a, and an ended row.

    Args:
      rows: which row each row becomes; -1 for none [B].
      empty: a state of so many rows, with so many cache slots.
    """

    def taken(new: Array, old: Array) -> Array:
        chosen = old[jnp.maximum(rows, 0)]
        if chosen.shape == new.shape:
            return chosen
        return new.at[tuple(map(slice, chosen.shape))].set(chosen)

    state = map_rows(taken, empty, state)
    return dataclasses.replace(state, finish=jnp.where(rows < 0, STOP, state.finish))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emitted:
    """What one step added: the first `count` of `tokens` [B, E], and `finish` after it [B]."""

    tokens: Array
    count: Array
    finish: Array


@dataclasses.dataclass(frozen=True)
class Output:
    """One finished row.

    Attributes:
      prompt_ids, token_ids: the prompt and what follows it, up to and including
        a stop token.
      tokens_per_step: as the decoder made them, before the cut.
      finish_reason: "stop" or "length"; "running" or "failed" in the middle of a text.
      drafts: steps that verified a tree.
      drafted: tokens that its steps verified, beside their roots.
      logprobs: of `token_ids`, where its row has asked for them.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    tokens_per_step: list[int]
    finish_reason: str
    drafts: int = dataclasses.field(default=0, compare=False)
    drafted: int = dataclasses.field(default=0, compare=False)
    logprobs: TextLogprobs | None = dataclasses.field(default=None, compare=False)

    def stopped(self, count: int) -> "Output":
        """The row as if its first `count` tokens had ended it; later steps are left out.

        Tokens (5, 2, 9, 4) in steps of (3, 1): of 2 tokens, the first step is left.
        """
        ends = list(itertools.accumulate(self.tokens_per_step))
        steps = bisect.bisect_left(ends, count) + 1
        share = min(steps / max(len(ends), 1), 1)
        return dataclasses.replace(
            self,
            token_ids=self.token_ids[:count],
            tokens_per_step=self.tokens_per_step[:steps],
            finish_reason=FINISH_REASONS[STOP],
            drafts=round(self.drafts * share),
            drafted=round(self.drafted * share),
            logprobs=self.logprobs and self.logprobs[:count],
        )

    def check(self, name: str) -> None:
        """Raises FloatingPointError if the row has failed; the message begins with `name`."""
        if self.finish_reason == FINISH_REASONS[FAILED]:
            raise FloatingPointError(
                f"{name}: the model's logits are not finite after {len(self.token_ids)} new "
                "tokens: its weights hold NaN or infinity, or its numbers overflowed; check the "
                "weights, and decode with dtype float32 if this was bfloat16"
            )

    @property
    def running(self) -> bool:
        """Whether the row has not ended yet."""
        return self.finish_reason == FINISH_REASONS[RUNNING]

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per step, root included; plain decoding has 1."""
        return sum(self.tokens_per_step) / max(len(self.tokens_per_step), 1)


def outputs(state: State) -> list[Output]:
    """Brings a state to the host, one `Output` a row."""
    sequence, prompt, length, tokens_per_step, steps, drafts, drafted, finish = jax.device_get(
        (
            state.sequence,
            state.prompt_length,
            state.cache.length,
            state.tokens_per_step,
            state.steps,
            state.drafts,
            state.drafted,
            state.finish,
        )
    )
    logprobs: list[TextLogprobs | None] = [None] * len(length)
    if state.logprobs is not None:
        logprobs = text_logprobs(state.logprobs, prompt, length)
    return [
        Output(
            prompt_ids=sequence[row, : prompt[row]].tolist(),
            token_ids=sequence[row, prompt[row] : length[row]].tolist(),
            tokens_per_step=tokens_per_step[row, : steps[row]].tolist(),
            finish_reason=FINISH_REASONS[finish[row]],
            drafts=int(drafts[row]),
            drafted=int(drafted[row]),
            logprobs=logprobs[row],
        )
        for row in range(len(length))
    ]
