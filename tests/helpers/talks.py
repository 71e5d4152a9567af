"""Conversations to train on, and what is learnt of them."""

from itertools import pairwise
from typing import Any

import numpy as np

from medusa_jax.data.encoding import Encoded
from medusa_jax.data.tokenizer import ChatTokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def talk(*contents: str, system: str = "", **rest: Any) -> dict[str, Any]:
    """A record of user and assistant in turn."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    opening = [{"role": "system", "content": system}] if system else []
    return {"messages": opening + messages, **rest}


def runs(text: ChatTokenizer, document: Encoded) -> list[str]:
    """The text of every unbroken run of learnt tokens."""
    edges = np.flatnonzero(np.diff(document.learnt, prepend=False, append=False))
    runs = [document.ids[a:b] for a, b in list(pairwise(edges))[::2]]
    return [text.tokenizer.decode(run) for run in runs]
