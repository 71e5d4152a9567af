"""Text to text: the API of two lines.

    generator = Generator.load()
    print(generator.generate(["Once upon a time"])[0].text)

An engine is made for the model when the first prompt comes, and kept.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from medusa_jax import kernels
from medusa_jax.checkpoints.hub import shipped
from medusa_jax.checkpoints.load import Model, load_model
from medusa_jax.checkpoints.parameters import Parameters
from medusa_jax.data.prompts import Request
from medusa_jax.data.tokenizer import ChatTokenizer, Message
from medusa_jax.decoding.acceptance import Acceptance
from medusa_jax.decoding.compilation import in_fast_order, on_tpu
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.stats import Stats
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.options import check
from medusa_jax.serving import tree_store
from medusa_jax.serving.conversations import (
    ROOM,
    Completion,
    Conversation,
    Prompt,
    Update,
    converse,
)
from medusa_jax.serving.drafters import (
    Recipe,
    check_vocabulary,
    draft_directory,
    drafter_of,
    heads_directory,
    with_draft,
)
from medusa_jax.serving.engine import Engine
from medusa_jax.serving.ladder import ladder_of
from medusa_jax.serving.options import (
    DEFAULT_NEW_TOKENS,
    DecodingOptions,
    acceptance_of,
    check_ends,
    check_tokens,
    tree_of,
)

log = logging.getLogger(__name__)


class Generator:
    """A model, its tokenizer, and how to decode with them.

    Attributes:
      model: the backbone and its heads.
      text: the tokenizer and its chat template.
      tree: what each step verifies; the root alone is plain decoding.
      acceptance: which of it becomes text.
      options: as it was made.
      at_most: new tokens where neither a call nor the options say how many, if they fit.
    """

    def __init__(
        self,
        model: Model,
        text: ChatTokenizer,
        tree: Tree | DynamicTree,
        acceptance: Acceptance,
        options: DecodingOptions,
        at_most: int = DEFAULT_NEW_TOKENS,
    ) -> None:
        context = model.config.context
        if options.max_length is not None and not 1 < options.max_length <= context:
            raise InputError(
                f"max_length {options.max_length} must lie in 2..{context}, the model's context"
            )
        self.model, self.text, self.tree, self.acceptance = model, text, tree, acceptance
        self.options, self.at_most = options, at_most
        check_tokens(options, self.stop_ids, self.suppress, model.config.vocab_size)

    @classmethod
    def load(
        cls,
        model: str | None = None,
        heads: str | None = None,
        dtype: str | None = None,
        mesh: str | None = None,
        **options: Any,
    ) -> "Generator":
        """Loads a model and its heads; without arguments the model that ships with the project.

        Args:
          model, heads, dtype, mesh, options: fields of `DecodingOptions`, which documents them.

        Raises:
          InputError: a file or an option is wrong; the message says which.
        """
        known = {field.name for field in dataclasses.fields(DecodingOptions)}
        if unknown := sorted(options.keys() - known):
            raise InputError(f"unknown options: {', '.join(unknown)}; expected {sorted(known)}")
        paths = {"model": model and str(model), "heads": heads and str(heads)}
        return load_generator(DecodingOptions(**paths, dtype=dtype, mesh=mesh, **options))

    def with_tree(
        self,
        tree: Tree | DynamicTree,
        acceptance: Acceptance | None = None,
        **options: Any,
    ) -> "Generator":
        """The same with another tree, and stats of its own; `Tree()` decodes plainly.

        Args:
          acceptance: another scheme.
          options: other values of `DecodingOptions` that do not concern the model.
        """
        changed = dataclasses.replace(self.options, **options)
        scheme = acceptance or self.acceptance
        return Generator(self.model, self.text, tree, scheme, changed, self.at_most)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        own = () if self.options.ignore_eos else self.model.stop_ids + self.text.stop_ids
        return tuple(sorted({*own, *self.options.stop_id}))

    @property
    def suppress(self) -> tuple[int, ...]:
        """Tokens that are never produced."""
        return tuple(sorted({*self.model.suppress, *self.options.suppress_tokens}))

    @property
    def repetition_penalty(self) -> float:
        """That of the options, else the model's own; 1 for none."""
        chosen = self.options.repetition_penalty
        return self.model.repetition_penalty if chosen is None else chosen

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine, with `options.batch_size` slots."""
        slots, seed, decoder = self.options.batch_size, self.options.seed, decoder_of(self)
        how = {"stop_ids": self.stop_ids, "repetition_penalty": self.repetition_penalty}
        ladder = None
        if self.options.by_load:
            ladder = ladder_of(decoder.drafter, slots, tuned_lengths(self))
        return Engine(decoder, self.model.parameters, slots=slots, seed=seed, ladder=ladder, **how)

    @property
    def stats(self) -> Stats:
        """What was decoded so far, and its cost."""
        return self.engine.stats

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int | None = None
    ) -> list[Completion]:
        """Answers all prompts, `options.batch_size` of them at a time.

        Args:
          prompts: each a text or a conversation, a list of {"role", "content"} whose last
            turn is the user's.
          max_new_tokens: default: that of the options, else what fits, at most `at_most`.

        Raises:
          InputError: a prompt is empty or does not fit; the others are not answered.
          FloatingPointError: the model's numbers are not finite.
        """
        conversations = [Conversation.of(prompt, i) for i, prompt in enumerate(prompts)]
        for _ in self.converse(conversations, refuse=True, max_new_tokens=max_new_tokens):
            pass
        return [one.completions[0] for one in conversations]

    def stream(self, prompt: Prompt, max_new_tokens: int | None = None) -> Iterator[str]:
        """Yields the text of an answer as it is accepted."""
        how: dict[str, Any] = {"stream": True, "refuse": True, "max_new_tokens": max_new_tokens}
        for update in self.converse([Conversation.of(prompt)], **how):
            yield update.text

    def converse(
        self,
        conversations: Iterable[Conversation],
        *,
        stream: bool = False,
        refuse: bool = False,
        max_new_tokens: int | None = None,
    ) -> Iterator[Update]:
        """`conversations.converse` in the engine's slots."""
        new_tokens = functools.partial(self.new_tokens, wanted=max_new_tokens)
        how: dict[str, Any] = {"stop": self.options.stop, "stream": stream, "refuse": refuse}
        return converse(self.engine, self.text, conversations, new_tokens, **how)

    def new_tokens(self, prompt_tokens: int, wanted: int | None = None) -> int:
        """Most new tokens of a prompt: `wanted`, or that of the options, else what fits."""
        room = self.engine.decoder.capacity - prompt_tokens
        return wanted or self.options.max_new_tokens or max(min(self.at_most, room), 1)

    def chat(self) -> "Chat":
        """A conversation that a person goes on with."""
        return Chat(self)


def decoder_of(generator: Generator) -> Decoder:
    """What the programs of a generator's engine are compiled from."""
    model = generator.model
    capacity = generator.options.max_length or model.config.context
    recipe = Recipe(model, generator.tree, generator.acceptance)
    drafter = drafter_of(generator.options.drafter, recipe)
    how = generator.acceptance, capacity, generator.suppress, model.mesh
    used, most = kernels.used(generator.options.no_kernels), generator.options.most_logprobs
    return Decoder(model.config, drafter, *how, kernels=used, most_logprobs=most)


def tuned_lengths(generator: Generator) -> list[tuple[Tree | DynamicTree, float]]:
    """Trees that were tuned for a generator's model, and the mean accepted length of each."""
    where = generator.model, generator.acceptance, 1, generator.model.precision
    found = tree_store.find(*where, own_heads=not generator.options.heads)
    return [] if found is None else tree_store.accepted_lengths(found.tuning)


def load_generator(
    options: DecodingOptions, *, at_most: int = DEFAULT_NEW_TOKENS, need_heads: bool = True
) -> Generator:
    """The generator that the options describe.

    Args:
      at_most: see `Generator`.
      need_heads: refuse a model without heads; otherwise it is decoded plainly.
    """
    check(options, prefix="")
    if (heads := heads_directory(options.drafter)) is not None:
        options = dataclasses.replace(options, heads=heads)
    acceptance = acceptance_of(options)  # before loading, which takes long
    check_ends(options)
    products = "products" in kernels.used(options.no_kernels)
    where = options.precision, options.mesh, products, options.quantize
    model = load_model(options.model or shipped(), options.heads, *where, read=False)
    text = ChatTokenizer(model.directory, raw=options.raw, template=options.chat_template)
    if (directory := draft_directory(options.drafter)) is not None:
        draft = load_model(directory, None, *where, read=False)
        check_vocabulary(text, draft.directory)
        model = with_draft(model, draft)
    tree: Tree | DynamicTree = Tree()
    if need_heads or model.heads.num_heads or options.drafter:
        tree = tree_of(options, model, acceptance)
    elif not options.autoregressive:
        log.warning("no Medusa heads were found with %s: plain decoding", model.directory)
    generator = Generator(model, text, tree, acceptance, options, at_most)
    if on_tpu(model.parameters.shapes):
        # For the tree, whose steps are most; plain decoding shares the weights and their order.
        params = in_fast_order(decoder_of(generator), model.params, options.batch_size)
        generator.model = dataclasses.replace(model, parameters=Parameters.of(params))
    return generator


class Chat:
    """A conversation whose turns come from a person.

    Attributes:
      history: messages so far.
      completion: the last answer.
    """

    def __init__(self, generator: Generator) -> None:
        self.history: list[Message] = []
        self.completion: Completion | None = None
        self._generator = generator

    def prepare(self) -> None:
        """Compiles what the turns need, and reads the model, while nobody waits for an answer."""
        self._generator.engine.warm_up(1, self._generator.new_tokens(1), ROOM)

    def say(self, turn: str) -> Iterator[str]:
        """Yields the answer to a turn as it is accepted; both join the history.

        Raises:
          InputError: the conversation no longer fits; the history stays as it was.
        """
        request = Request((turn,), tuple(self.history))
        conversation = Conversation(request, number=len(self.history), open_ended=True)
        for update in self._generator.converse([conversation], stream=True, refuse=True):
            yield update.text
        self.history = conversation.messages
        self.completion = conversation.completions[-1]
