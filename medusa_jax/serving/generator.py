"""Answers to prompts: batches of requests through tokenizer and decoder, timed.

`Answerer` is the whole way from text to text for programs that decode many
prompts (`decode.py`, data generation, benchmarks). `decode.Decoder` below it
knows token ids only.
"""

import dataclasses
import logging
import time
from collections.abc import Generator, Sequence
from typing import Any

import jax

from medusa_jax.checkpoints.load import Model
from medusa_jax.data.prompts import Request
from medusa_jax.data.tokenizer import Message, Text, TextStream
from medusa_jax.decoding.acceptance import Acceptance
from medusa_jax.decoding.decoder import SLOTS_MULTIPLE, Decoder, Output, State, outputs, round_up
from medusa_jax.decoding.sampling import row_keys
from medusa_jax.decoding.stats import Figures
from medusa_jax.drafting.dynamic_tree import Grown
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 256
SMALLEST_CAPACITY = 128
FINE_CAPACITY = 512

# Which random stream a row draws from: (prompt number, sample number).
RowName = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How far to decode.

    Attributes:
      max_new_tokens: most new tokens, which must fit; None takes what fits, up to `at_most`.
      max_length: most tokens of prompt and text together; None: the model's context.
      stop_ids: tokens that end a row; empty to go on past end-of-sequence.
      at_most: see `max_new_tokens`.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    stop_ids: tuple[int, ...] = ()
    at_most: int = DEFAULT_NEW_TOKENS


class Answerer:
    """Decodes prompts with one model, tree and acceptance."""

    def __init__(
        self,
        model: Model,
        text: Text,
        tree: Tree | Grown,
        acceptance: Acceptance,
        limits: Limits,
        *,
        seed: int = 0,
        suppress: tuple[int, ...] = (),
    ) -> None:
        context = model.config.context
        if limits.max_length is not None and not 1 < limits.max_length <= context:
            raise InputError(
                f"max_length {limits.max_length} must lie in 2..{context}, the model's context"
            )
        if limits.max_new_tokens is not None and limits.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {limits.max_new_tokens}")
        self.model, self.text, self.limits, self.seed = model, text, limits, seed
        self.figures = Figures()
        self._max_length = limits.max_length or context
        self._decoder = Decoder(
            model.config, model.heads, tree, acceptance, self._max_length, suppress, model.mesh
        )
        self._compiled: set[Any] = set()

    @property
    def tree(self) -> Tree | Grown:
        """The tree in use."""
        return self._decoder.tree

    @property
    def acceptance(self) -> Acceptance:
        """The acceptance scheme in use."""
        return self._decoder.acceptance

    @property
    def suppress(self) -> tuple[int, ...]:
        """Tokens that are never produced."""
        return self._decoder.suppress

    def with_tree(
        self,
        tree: Tree | Grown,
        *,
        acceptance: Acceptance | None = None,
        stops: bool = True,
    ) -> "Answerer":
        """The same with another tree, and figures of its own; `Tree()` decodes plainly.

        With an `acceptance`, that one; without `stops`, texts go on past end-of-sequence.
        """
        decoder = self._decoder
        limits = self.limits if stops else dataclasses.replace(self.limits, stop_ids=())
        return Answerer(
            self.model,
            self.text,
            tree,
            acceptance or decoder.acceptance,
            limits,
            seed=self.seed,
            suppress=decoder.suppress,
        )

    def encode(self, messages: Sequence[Message], origin: str = "the prompt") -> list[int]:
        """Prompt ids of a conversation, checked to fit.

        Raises:
          InputError: empty, or too long; names `origin`.
        """
        if not any(message["content"] for message in messages if message["role"] == "user"):
            raise InputError(f"{origin} is empty")
        return self.check(self.text.encode(messages), origin)

    def check(self, prompt_ids: Sequence[int], origin: str = "the prompt") -> list[int]:
        """The ids; raises InputError, naming `origin`, if the decoder would refuse them."""
        self._decoder.check_prompt(prompt_ids, self.limits.max_new_tokens or 1, origin)
        return list(prompt_ids)

    def answer(
        self, requests: Sequence[Request], rows: Sequence[RowName], batch_size: int | None = None
    ) -> list[list[dict[str, Any]]]:
        """Answers one batch: request i as random row `rows[i]`, turn after turn.

        Args:
          batch_size: rows to pad the batch to, so that a short last batch
            compiles nothing new.

        Returns:
          for each request, one record a turn with the keys `prompt`,
          `prompt_ids`, `text`, `token_ids`, `tokens_per_step`,
          `mean_accepted_length`, `finish_reason`, `seconds` (of its batch),
          `turn`, `sample` and, where the request has one, `id`. A conversation
          that outgrows the context ends there, with a warning.
        """
        records: list[list[dict[str, Any]]] = [[] for _ in requests]
        histories = [list(request.history) for request in requests]
        for turn in range(max(request.num_turns for request in requests)):
            live, prompts = [], []
            for i, request in enumerate(requests):
                if turn < request.num_turns and len(records[i]) == turn:
                    prompt = self.prompt(request, histories[i], turn)
                    if prompt is not None:
                        prompts.append(prompt)
                        live.append(i)
            if not live:
                break
            results, seconds = self.run(prompts, [rows[i] for i in live], batch_size)
            for i, output in zip(live, results, strict=True):
                record = self.record(requests[i], rows[i], turn, output, seconds)
                histories[i].append({"role": "assistant", "content": record["text"].strip()})
                records[i].append(record)
        return records

    def stream(
        self, prompt_ids: list[int], row: RowName = (0, 0)
    ) -> Generator[str, None, tuple[Output, float]]:
        """Yields the text of one prompt as it is accepted; returns the output and its seconds."""
        decoder, keys = self._ready([prompt_ids], [row], streaming=True)
        pieces = TextStream(self.text, prompt_ids)
        start = time.perf_counter()
        state = self._prefill(decoder, [prompt_ids], [self._new_tokens(len(prompt_ids))], keys)
        prefilled = time.perf_counter()
        steps = decoder.stream(self.model.params, state)
        while True:
            try:
                emitted = next(steps)
            except StopIteration as stop:
                state = stop.value
                break
            if piece := pieces.push(emitted.tokens[0, : emitted.count[0]].tolist()):
                yield piece
        end = time.perf_counter()
        if piece := pieces.finish():
            yield piece
        done = outputs(state)
        self.figures.add(decoder, self.model.params, done, end - start, end - prefilled)
        return done[0], end - start

    def run(
        self, prompts: Sequence[list[int]], rows: Sequence[RowName], batch_size: int | None = None
    ) -> tuple[list[Output], float]:
        """Decodes one batch of token ids; the outputs and the seconds they took."""
        padding = max((batch_size or 0) - len(prompts), 0)
        filler = [0]
        prompts = [*prompts, *[filler] * padding]
        new_tokens = [self._new_tokens(len(prompt)) for prompt in prompts]
        new_tokens[len(prompts) - padding :] = [1] * padding
        decoder, keys = self._ready(prompts, [*rows, *[(0, 0)] * padding], streaming=False)
        start = time.perf_counter()
        state = self._prefill(decoder, prompts, new_tokens, keys)
        prefilled = time.perf_counter()
        state = jax.block_until_ready(decoder.generate(self.model.params, state))
        end = time.perf_counter()
        done = outputs(state)[: len(prompts) - padding]
        self.figures.add(decoder, self.model.params, done, end - start, end - prefilled)
        return done, end - start

    def record(
        self, request: Request, row: RowName, turn: int, output: Output, seconds: float
    ) -> dict[str, Any]:
        """One answer, with the keys that `answer` names."""
        prompt = request.turns[turn] if request.turns else self.text.decode([], output.prompt_ids)
        named = {} if request.id is None else {"id": request.id}
        return named | {
            "prompt": prompt,
            "prompt_ids": output.prompt_ids,
            "text": self.text.decode(output.prompt_ids, output.token_ids),
            "token_ids": output.token_ids,
            "tokens_per_step": output.tokens_per_step,
            "mean_accepted_length": output.mean_accepted_length,
            "finish_reason": output.finish_reason,
            "seconds": seconds,
            "turn": turn,
            "sample": row[1],
        }

    def prompt(self, request: Request, history: list[Message], turn: int) -> list[int] | None:
        """Prompt ids of a turn, which is appended to the history.

        None, with a warning, where a later turn does not fit any more; for the
        first, InputError.
        """
        if request.prompt_ids:
            return self.check(request.prompt_ids, request.origin)
        history.append({"role": "user", "content": request.turns[turn]})
        try:
            return self.encode(history, request.origin)
        except InputError as error:
            if turn == 0:
                raise
            log.warning("%s; turn %d and what follows is left out", error, turn + 1)
            return None

    def _new_tokens(self, prompt_tokens: int) -> int:
        room = self._max_length - prompt_tokens
        return self.limits.max_new_tokens or min(self.limits.at_most, room)

    def _ready(
        self, prompts: Sequence[list[int]], rows: Sequence[RowName], *, streaming: bool
    ) -> tuple[Decoder, jax.Array]:
        """A decoder of a fitting capacity, compiled for this batch, and the rows' keys.

        Attention reads every slot, so there are hardly more than needed; long texts get a
        power of two, so that few numbers of them are compiled.
        """
        need = max(len(prompt) + self._new_tokens(len(prompt)) for prompt in prompts)
        capacity = max(SMALLEST_CAPACITY, 1 << (need - 1).bit_length())
        if capacity <= FINE_CAPACITY:
            tail = self.tree.path_cells
            capacity = max(SMALLEST_CAPACITY, round_up(need + tail, SLOTS_MULTIPLE) - tail)
        decoder = dataclasses.replace(self._decoder, capacity=min(capacity, self._max_length))
        keys = row_keys(self.seed, list(rows))
        width = decoder.padded_length(max(map(len, prompts)))
        shape = (decoder, len(prompts), width, streaming)
        if shape not in self._compiled:
            self._compiled.add(shape)
            blank = [[0] * min(width, decoder.capacity - 1)] * len(prompts)
            state = self._prefill(decoder, blank, [1] * len(prompts), keys)
            drive = decoder.step if streaming else decoder.generate
            jax.block_until_ready(drive(self.model.params, state))
        return decoder, keys

    def _prefill(
        self, decoder: Decoder, prompts: Sequence[list[int]], new: Sequence[int], keys: jax.Array
    ) -> State:
        state = decoder.prefill(
            self.model.params,
            prompts,
            max_new_tokens=new,
            stop_ids=self.limits.stop_ids,
            keys=keys,
        )
        return jax.block_until_ready(state)
