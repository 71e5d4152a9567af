"""The data of a run: sources to rows, for training and held out."""

import logging
import math

import numpy as np

from medusa_jax.checkpoints.hub import resolve
from medusa_jax.data.corpus import Corpus
from medusa_jax.data.encoding import Encoded, encode
from medusa_jax.data.packing import Rows, fit, pack
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.errors import InputError
from medusa_jax.training.settings import Config

log = logging.getLogger(__name__)


def read_rows(config: Config, say: bool) -> tuple[Rows, Rows]:
    """Training and held-out rows.

    Raises:
      InputError: no data, or none of it can be learnt from.
    """
    data = config.data
    if not data.train:
        raise InputError("data.train names no file and no hub dataset")
    if not config.model.path:
        raise InputError("model.path names no model, whose tokenizer the data needs")
    text = ChatTokenizer(resolve(config.model.path), template=data.template or None)

    def encoded(sources: tuple[str, ...]) -> list[Encoded]:
        corpus = Corpus(
            sources,
            separator=data.separator,
            max_documents=data.max_documents,
            on_bad=data.on_bad,
        )
        documents = list(encode(corpus, text, data.end))
        if corpus.skipped and say:
            log.warning(
                "%d of %d records were left out; the first: %s",
                len(corpus.skipped),
                len(corpus.skipped) + len(documents),
                corpus.skipped[0],
            )
        return documents

    train = encoded(data.train)
    if data.eval:
        held_out = encoded(data.eval)
    else:
        order = np.random.default_rng(config.seed).permutation(len(train))
        count = min(math.ceil(data.eval_fraction * len(train)), len(train) - 1)
        if count < 1:
            raise InputError(
                f"nothing to hold out: data.eval is empty, data.eval_fraction {data.eval_fraction}"
                f" of {len(train)} documents"
            )
        held_out = [train[i] for i in order[:count]]
        train = [train[i] for i in order[count:]]

    def rows(documents: list[Encoded], sources: tuple[str, ...]) -> Rows:
        pieces = fit(documents, data.sequence_length, ", ".join(sources))
        return pack(pieces, data.sequence_length, packing=data.packing, seed=config.seed)

    return rows(train, data.train), rows(held_out, data.eval or data.train)
