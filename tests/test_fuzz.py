"""Spoilt files of each kind are read, or refused with the package's own error: no other escapes.

MEDUSA_JAX_FUZZ=300 tries that many mutations a kind; a few by default.
"""

import contextlib
import functools
import io
import json
import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mutations
from helpers.head_files import heads_file, original, random_heads
from safetensors.numpy import save_file

from medusa_jax.checkpoints import bigram_file, conversion
from medusa_jax.checkpoints.heads import check_fit, open_heads
from medusa_jax.checkpoints.hub import shipped
from medusa_jax.checkpoints.load import Model, load_model
from medusa_jax.checkpoints.tensors import open_model
from medusa_jax.data.corpus import Corpus
from medusa_jax.data.prompts import read_requests
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.model.layers import rope_tables
from medusa_jax.serving import tree_store

COUNT = int(os.environ.get("MEDUSA_JAX_FUZZ", "40"))
SECONDS = 20  # of one mutation; more counts as a hang

TREE = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]
TUNING = {"acceptance": {"scheme": "Greedy"}, "batch_size": 1, "backend": "cpu", "tree": TREE}
GROWN = TUNING | {"batch_size": 4, "tree": {"size": 4, "depth": 2, "top_k": 3}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GENERATION = {"eos_token_id": [2, 3], "suppress_tokens": [0], "bos_token_id": 1}
PROMPTS = [
    {"prompt": "Once upon a time"},
    {"turns": ["a", "b"], "question_id": 3},
    {"messages": [{"role": "user", "content": "hi"}]},
    {
        "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
        "category": "c",
    },
    {"prompt_ids": [1, 2, 3]},
]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
RECORDS = [
    {"id": "a", "conversations": PROMPTS[3]["conversations"]},
    {"messages": TALK, "truncated": True},
    {"text": "story"},
]
# A kind: its mutations, and what reads them. Each is made of files in a directory of its own.
Kind = tuple[Callable[[random.Random], bytes], Callable[[bytes], None]]
KINDS: dict[str, Callable[[Path, Path], Kind]] = {}


def kind(make: Callable[[Path, Path], Kind]) -> Callable[[Path, Path], Kind]:
    KINDS[make.__name__] = make
    return make


def of_json(value: Any) -> Callable[[random.Random], bytes]:
    return functools.partial(mutations.of_json, value=value)


@kind
def heads(place: Path, saved: Path) -> Kind:
    file = heads_file(place, random_heads(2))
    config = load_model(saved).config

    def read(data: bytes) -> None:
        file.write_bytes(data)
        found = open_heads(file)
        check_fit(found, config)
        for tensor in found.tensors.values():
            tensor.read()

    return functools.partial(mutations.of_safetensors, data=file.read_bytes()), read


@kind
def config_of_heads(place: Path, saved: Path) -> Kind:
    settings = {"medusa_num_heads": 2, "medusa_num_layers": 1, "vocab_size": 24, "hidden_size": 16}
    source = original(place / "heads", random_heads(2), base_model_name_or_path="x", **settings)
    targets = iter(range(10**9))

    def read(data: bytes) -> None:
        (source / "config.json").write_bytes(data)
        number = next(targets)
        target = ("vllm", "mlc", "v0.1", "tgi")[number % 4]
        with contextlib.redirect_stdout(io.StringIO()):
            conversion.convert(str(source), target, place / f"{number}")

    return of_json(settings | {"base_model_name_or_path": "x"}), read


def directory(place: Path, source: Path, name: str) -> Path:
    """Links to a model's files, but for one that is written anew."""
    for file in source.iterdir():
        if file.name != name:
            (place / file.name).symlink_to(file.resolve())
    return place / name


def loading(place: Path, saved: Path, name: str, content: Any) -> Kind:
    file = directory(place, saved, name)

    def read(data: bytes) -> None:
        file.write_bytes(data)
        usable(load_model(place))

    return of_json(content), read


def usable(model: Model) -> None:
    """What decoding does with a model's settings, short of running it."""
    config = model.config
    tables = rope_tables(config, jnp.arange(8))
    assert all(np.isfinite(table).all() for table in tables)
    Decoder(config, suppress=model.suppress)
    np.array(model.stop_ids, np.int32)


@kind
def config_of_backbone(place: Path, saved: Path) -> Kind:
    settings = json.loads((saved / "config.json").read_text())
    return loading(place, saved, "config.json", settings | {"rope_parameters": YARN})


@kind
def generation_config(place: Path, saved: Path) -> Kind:
    return loading(place, saved, "generation_config.json", GENERATION)


@kind
def index(place: Path, saved: Path) -> Kind:
    save_file(random_heads(2), place / "one.safetensors")
    file = place / "model.safetensors.index.json"
    placed = dict.fromkeys(random_heads(2), "one.safetensors")

    def read(data: bytes) -> None:
        file.write_bytes(data)
        for tensor in open_model(place).values():
            tensor.read()

    return of_json({"metadata": {"total_size": 1}, "weight_map": placed}), read


@kind
def tree(place: Path, saved: Path) -> Kind:
    file = place / "tree.json"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        made = Tree.from_json(file)
        made.check(5, 512)
        assert len(made.mask) == made.size

    return of_json(TREE), read


@kind
def tuned_trees(place: Path, saved: Path) -> Kind:
    file = place / tree_store.BESIDE

    def read(data: bytes) -> None:
        file.write_bytes(data)
        for tuning in tree_store.read(file):
            tree_store.tree_of(tuning).check(5, 512)
            assert 4 / tuning["batch_size"] > 0
            assert isinstance(tuning["acceptance"]["scheme"], str)

    return of_json({"tunings": [TUNING, GROWN]}), read


@kind
def bigrams(place: Path, saved: Path) -> Kind:
    file = bigram_file.save(place, np.arange(4), np.zeros((4, 4)))

    def read(data: bytes) -> None:
        file.write_bytes(data)
        bigram_file.load(file, 512)

    return functools.partial(mutations.of_safetensors, data=file.read_bytes()), read


@kind
def prompts(place: Path, saved: Path) -> Kind:
    file, text = place / "p.jsonl", ChatTokenizer(shipped())

    def read(data: bytes) -> None:
        file.write_bytes(data)
        for request in read_requests(file):
            if not request.prompt_ids:
                text.encode([{"role": "user", "content": request.turns[0]}])

    return functools.partial(mutations.of_json_lines, values=PROMPTS), read


def training(place: Path, name: str) -> Callable[[bytes], None]:
    file, text = place / name, ChatTokenizer(shipped())

    def read(data: bytes) -> None:
        file.write_bytes(data)
        for document in Corpus([str(file)]):
            for message in document.messages or [{"content": document.text}]:
                text.tokenizer.encode(message["content"])

    return read


@kind
def training_lines(place: Path, saved: Path) -> Kind:
    made = functools.partial(mutations.of_json_lines, values=RECORDS)
    return made, training(place, "t.jsonl")


@kind
def training_json(place: Path, saved: Path) -> Kind:
    return of_json(RECORDS), training(place, "t.json")


def tokenizing(place: Path, name: str) -> Callable[[bytes], None]:
    file = directory(place, shipped(), name)

    def read(data: bytes) -> None:
        file.write_bytes(data)
        text = ChatTokenizer(place)
        text.encode([{"role": "user", "content": "Once upon a time"}])
        text.decode([1, 2], [3, 4, 400])

    return read


@kind
def tokenizer_config(place: Path, saved: Path) -> Kind:
    settings = json.loads(shipped("tokenizer_config.json").read_text())
    return of_json(settings), tokenizing(place, "tokenizer_config.json")


@kind
def tokenizer(place: Path, saved: Path) -> Kind:
    data = shipped("tokenizer.json").read_bytes()
    return functools.partial(mutations.of_bytes, data=data), tokenizing(place, "tokenizer.json")


class Hang(BaseException):
    """A mutation took too long."""


@contextlib.contextmanager
def clock() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", KINDS)
def test_only_the_packages_own_error_escapes(name: str, saved: Path, tmp_path: Path):
    mutate, read = KINDS[name](tmp_path, saved)
    rng = random.Random(name)
    count = COUNT if "tokenizer" not in name else -(-COUNT // 5)
    escaped, refused = [], 0
    for number in range(count):
        data = mutate(rng)
        try:
            with clock():
                read(data)
        except InputError as error:
            refused += 1
            assert str(error).strip()
        except (Exception, Hang) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            escaped.append(
                f"mutation {number}: {type(error).__name__}: {str(error)[:200]} in "
                f"{frame.filename}:{frame.lineno}: {data[:300]!r}"
            )
    assert not escaped, f"{len(escaped)} of {count}\n" + "\n".join(escaped[:8])
    assert refused, "no mutation was refused: they do not reach the reader"
