"""Documents to token ids, and which of them are learnt: the assistant's, or all of a plain text.

A conversation is written with the model's chat template, once, as inference
writes it. Where an answer begins and ends is found by rendering the
conversation up to it: the text that the template adds for the answer (its
end-of-sequence token included) is learnt, everything else is read only.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from medusa_jax.errors import InputError
from medusa_jax.text import Text
from medusa_jax.training.corpus import Corpus, Document


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


def encode(corpus: Corpus, text: Text, end: str = "", batch: int = 512) -> Iterator[Encoded]:
    """Tokenizes documents, many at a time; those that the template refuses go to `corpus.bad`.

    Args:
      end: token appended to every plain text, as text; empty for none.

    Raises:
      InputError: an unknown `end`, and whatever the corpus raises.
    """
    known = text.tokenizer.get_vocab()
    if end and end not in known:
        raise InputError(f"data.end {end!r} is no token of the model")
    pending: list[tuple[Document, str, list[Span]]] = []
    for document in corpus:
        try:
            pending.append((document, *written(document, text, end)))
        except InputError as error:
            corpus.bad(error)
        if len(pending) == batch:
            yield from _tokenize(pending, text)
            pending = []
    yield from _tokenize(pending, text)


def written(document: Document, text: Text, end: str = "") -> tuple[str, list[Span]]:
    """The document as text, and the spans of it that are learnt, in characters.

    With a template that writes "Q: {user} A: {assistant}</s>", the conversation
    (hi, hello) becomes "Q: hi A: hello</s>" with one span, over "hello</s>".
    """
    bos, end = text.tokenizer.bos_token or "", "" if document.truncated else end
    if not document.messages:
        return bos + document.text + end, [(len(bos), len(bos + document.text + end))]
    messages = list(document.messages)
    if text.template is None:
        return _continued(document, bos, end)
    spans, whole = [], text.render(messages, answer=False)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = text.render(messages[:i], answer=True)
        after = text.render(messages[: i + 1], answer=False).rstrip()
        if not (whole.startswith(before) and whole.startswith(after)):
            raise InputError(
                f"{document.origin}: the chat template rewrites earlier turns, so that answers "
                "cannot be found in it; give a simpler one (data.template)"
            )
        if document.truncated and i == len(messages) - 1:
            content = message["content"].rstrip()
            after = whole[: whole.index(content, len(before)) + len(content)]
            whole = after
        spans.append((len(before), len(after)))
    return whole, spans


def _continued(document: Document, bos: str, end: str) -> tuple[str, list[Span]]:
    """A base model's "conversation": one prompt and the text that continues it."""
    roles = [message["role"] for message in document.messages]
    if roles != ["user", "assistant"]:
        raise InputError(
            f"{document.origin}: the tokenizer has no chat template, which a conversation of "
            f"{len(roles)} turns needs: give one (data.template)"
        )
    prompt, answer = (message["content"] for message in document.messages)
    start = len(bos + prompt)
    return bos + prompt + answer + end, [(start, start + len(answer + end))]


def _tokenize(pending: list[tuple[Document, str, list[Span]]], text: Text) -> Iterator[Encoded]:
    if not pending:
        return
    encoding = text.tokenizer(
        [whole for _, whole, _ in pending],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    rows = zip(pending, encoding["input_ids"], encoding["offset_mapping"], strict=True)
    for (document, _, spans), ids, offsets in rows:
        places = np.asarray(offsets, np.int64).reshape(-1, 2)
        learnt = np.zeros(len(ids), bool)
        for start, stop in spans:
            # A token belongs where its last character lies: " Hello" to the answer "Hello".
            learnt |= (places[:, 1] > start) & (places[:, 1] <= stop)
        yield Encoded(np.asarray(ids, np.int32), learnt, document.origin)
