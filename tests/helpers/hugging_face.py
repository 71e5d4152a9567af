"""Greedy decoding by transformers: the reference of decoding tests, and the models to try it on."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.models import random_model
from medusa_jax.checkpoints.load import Model, load_model
from medusa_jax.checkpoints.parameters import Parameters

STORIES = [
    "Once upon a time",
    "Tom",
    "The sun was shining and the birds were singing in the big old tree. Lily",
    "One day",
    "She",
    "Ben and Mia went to the park to play. They saw a",
    "There was a little",
    "Mom said",
]
TEXTS = {
    "stories260K": STORIES,
    "babyllama105": STORIES,
    "poem": [
        f"主题：{theme} 体裁：{form}\n"
        for theme in ("明月", "秋", "春风", "江水")
        for form in ("五绝", "七律")
    ],
}
# What a model would write for ever, or where no text has a length worth a test.
SUPPRESS = {"stories260K": (), "babyllama105": (), "poem": (0,)}


@functools.cache
def tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def prompts(directory: Path) -> list[list[int]]:
    """The texts of a model as token ids, after BOS."""
    own = tokenizer(directory)
    return [
        [own.bos_token_id, *own.encode(text, add_special_tokens=False)]
        for text in TEXTS[directory.name]
    ]


def greedy(
    directory: Path, prompts: Sequence[Sequence[int]], new_tokens: int, **settings: Any
) -> list[list[int]]:
    """Greedy continuations by transformers' generate, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # more only wait for each other at these sizes
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False
    )
    texts = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **settings,
        )
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def with_heads(directory: Path) -> Model:
    """A real model with its heads, or with random ones, whose guesses are nearly always wrong."""
    import dataclasses

    own = directory.parent / f"{directory.name}-medusa"
    if own.is_dir():
        return load_model(directory, own)
    model = load_model(directory)
    random = random_model(model.config, num_heads=3)
    params = model.params | {"heads": random.params["heads"]}
    return dataclasses.replace(model, heads=random.heads, parameters=Parameters.of(params))
