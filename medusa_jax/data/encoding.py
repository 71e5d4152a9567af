"""Documents to token ids, and which of them are learnt: the assistant's, or all of a plain text.

A conversation is written with the model's chat template, once, as inference
writes it. An answer is learnt from where inference would begin it (the
conversation so far, with the template's generation prompt) to the end of its
turn, end-of-sequence token included; everything else is read only. Where the
content ends is found by rendering the conversation with a mark in its place.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from medusa_jax.data.corpus import Corpus, Document
from medusa_jax.data.messages import Message, is_answer
from medusa_jax.data.tokenizer import MARK, ChatTokenizer
from medusa_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A document as the model reads it.

    Attributes:
      ids: token ids [T] int32.
      learnt: whether a token is a target [T] bool.
      origin: file and record.
    """

    ids: np.ndarray
    learnt: np.ndarray
    origin: str


Span = tuple[int, int]


def encode(
    corpus: Corpus, text: ChatTokenizer, end: str = "", batch: int = 512
) -> Iterator[Encoded]:
    """Tokenizes documents, many at a time; those that cannot be written go to `corpus.bad`.

    Args:
      end: token appended to every plain text, as text; empty for none.

    Raises:
      InputError: an unknown `end`, a token that the model lacks, and what the corpus raises.
    """
    known = text.tokenizer.get_vocab()
    if end and end not in known:
        raise InputError(f"data.end {end!r} is no token of the model")
    pending: list[tuple[Document, str, list[Span]]] = []
    for document in corpus:
        if document.written is not None and document.written.vocabulary == text.fingerprint:
            yield from _tokenize(pending, text, corpus)
            pending = []
            yield as_written(document, text)
            continue
        try:
            pending.append((document, *written(document, text, end)))
        except InputError as error:
            corpus.bad(InputError(f"{document.origin}: {error}"))
        if len(pending) == batch:
            yield from _tokenize(pending, text, corpus)
            pending = []
    yield from _tokenize(pending, text, corpus)


def as_written(document: Document, text: ChatTokenizer) -> Encoded:
    """A document whose tokens are known already.

    Raises:
      InputError: the model lacks one of them.
    """
    known = document.written
    assert known is not None
    try:
        text.check_ids(known.token_ids)
    except InputError as error:
        raise InputError(f"{document.origin}: {error}") from None
    learnt = np.zeros(len(known.token_ids), bool)
    for start, stop in known.learnt:
        learnt[start:stop] = True
    return Encoded(np.asarray(known.token_ids, np.int32), learnt, document.origin)


def written(document: Document, text: ChatTokenizer, end: str = "") -> tuple[str, list[Span]]:
    """The document as text, and the spans of it that are learnt, in characters.

    With a template that writes "Q: {user} A: {assistant}</s>", the conversation
    (hi, hello) becomes "Q: hi A: hello</s>" with one span, over " hello</s>".
    Plain text has no BOS yet: a template writes it, `encode` adds it otherwise.
    """
    if document.truncated:
        end = ""
    if not document.messages:
        return document.text + end, [(0, len(document.text + end))]
    if text.template is None:
        return _continued(document, end)
    messages, spans = list(document.messages), []
    text.check_written(messages)
    answers = [i for i, message in enumerate(messages) if is_answer(message)]
    whole, first, *parts = text.render_all(
        [
            (messages, False),
            (_marked(messages[: answers[0] + 1], answers[0]), False),
            *((messages[:i], True) for i in answers),
            *((_marked(messages, i), False) for i in answers),
        ]
    )
    closing = _after(first).rstrip()  # "</s>" of "</s>\n"
    for i, before, marked in zip(
        answers, parts[: len(answers)], parts[len(answers) :], strict=True
    ):
        after = _after(marked)
        stop = len(whole) - len(after)
        if not (whole.startswith(before) and whole.endswith(after) and len(before) <= stop):
            raise InputError(
                "the chat template rewrites earlier turns, so that answers cannot be found in it; "
                "give a simpler one (data.template)"
            )
        if document.truncated and i == len(messages) - 1:
            whole = whole[:stop]
        elif after.startswith(closing):
            stop += len(closing)
        spans.append((len(before), stop))
    return whole, spans


def _marked(messages: list[Message], i: int) -> list[Message]:
    """The messages with a mark for the content of message i."""
    return [*messages[:i], {**messages[i], "content": MARK}, *messages[i + 1 :]]


def _after(marked: str) -> str:
    """What a template writes after the mark; all, where it omits that."""
    return marked.rpartition(MARK)[2]


def _continued(document: Document, end: str) -> tuple[str, list[Span]]:
    """A base model's "conversation": one prompt and the text that continues it."""
    roles = [message["role"] for message in document.messages]
    if roles != ["user", "assistant"]:
        raise InputError(
            f"the tokenizer has no chat template, which a conversation of {len(roles)} turns "
            "needs: give one (data.template)"
        )
    prompt, answer = (message["content"] for message in document.messages)
    return prompt + answer + end, [(len(prompt), len(prompt + answer + end))]


def _tokenize(
    pending: list[tuple[Document, str, list[Span]]], text: ChatTokenizer, corpus: Corpus
) -> Iterator[Encoded]:
    """The documents as token ids; where one stops the tokenizer, that one is bad."""
    if not pending:
        return
    try:
        encoding = text.tokenizer(
            [whole for _, whole, _ in pending],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
    except Exception as error:
        if len(pending) == 1:
            corpus.bad(InputError(f"{pending[0][0].origin} cannot be tokenized: {error}"))
        else:
            for single in pending:
                yield from _tokenize([single], text, corpus)
        return
    bos = text.tokenizer.bos_token_id
    rows = zip(pending, encoding["input_ids"], encoding["offset_mapping"], strict=True)
    for (document, _, spans), ids, offsets in rows:
        places = np.asarray(offsets, np.int64).reshape(-1, 2)
        learnt = np.zeros(len(ids), bool)
        for start, stop in spans:
            # A token belongs where its last character lies: " Hello" to the answer "Hello".
            learnt |= (places[:, 1] > start) & (places[:, 1] <= stop)
        if bos is not None and not (document.messages and text.template):
            ids, learnt = [bos, *ids], np.append(False, learnt)
        try:
            text.check_ids(ids)
        except InputError as error:  # every document has this token: leaving them out helps nobody
            raise InputError(f"{document.origin}: {error}") from None
        yield Encoded(np.asarray(ids, np.int32), learnt, document.origin)
