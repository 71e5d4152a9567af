"""Flags that choose how to decode, and what they mean: for every command line that does.

`decode.py` and `medusa_jax.distill` add flags of their own to these.
"""

import argparse
import logging
import re
from pathlib import Path

import jax

from medusa_jax.checkpoints.hub import shipped
from medusa_jax.checkpoints.load import Model, load_model
from medusa_jax.data.tokenizer import Text
from medusa_jax.decoding.acceptance import SCHEMES, Acceptance, Greedy, Lossless, Typical
from medusa_jax.drafting.dynamic_tree import Grown
from medusa_jax.drafting.tree import Tree, published_names
from medusa_jax.errors import InputError
from medusa_jax.serving import tree_store
from medusa_jax.serving.generator import DEFAULT_NEW_TOKENS, Answerer, Limits

log = logging.getLogger(__name__)

MOST_RANKS = 10  # guesses of each head that trees are made of; the original's top-k


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `acceptance`, `build` and `choose_tree` read."""
    add = parser.add_argument
    add("--model", default=str(shipped("")), help="Hugging Face directory or hub id, heads inside "
        "or not (default: the small model that comes with the project)")  # fmt: skip
    add("--heads", help="directory, file or hub id of Medusa heads (default: the model's own)")
    add("--chat_template", help="vicuna, zephyr or a Jinja file (default: the tokenizer's)")
    add(
        "--tree",
        default="auto",
        help="auto: the one tuned for this model "
        "and device; a published name; a JSON file; grow:SIZE or grow:SIZE:DEPTH: grown anew at "
        "every step",
    )
    add("--acceptance", default="greedy", help=" | ".join(SCHEMES))
    add("--temperature", type=float, help="default: 1.0 lossless, 0.7 typical")
    add("--top_k", type=int, default=0, help="lossless: tokens kept, 0 for all")
    add("--top_p", type=float, default=1.0, help="lossless: probability mass kept")
    add("--epsilon", type=float, default=0.09, help="typical: posterior threshold")
    add("--alpha", type=float, default=0.3, help="typical: factor of exp(-entropy)")
    add("--sample_root", action="store_true", help="typical: draw the root token")
    add("--seed", type=int, default=0)
    add("--autoregressive", action="store_true", help="plain decoding, one token a step")
    add("--max_length", type=int, help="prompt and text together (default: the context)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    add("--mesh", metavar="tensor=N", help="split model and work over N devices (default: one)")
    add("--ignore_eos", action="store_true", help="go on past end-of-sequence")
    add("--stop_id", type=int, action="append", default=[], help="another token that ends a text")
    add("--suppress_tokens", type=int, nargs="+", default=[], help="ids never to produce")


def acceptance(flags: argparse.Namespace) -> Acceptance:
    """The acceptance scheme that the flags describe."""
    if flags.acceptance == "greedy":
        return Greedy()
    if flags.acceptance == "typical":
        temperature = 0.7 if flags.temperature is None else flags.temperature
        return Typical(temperature, flags.epsilon, flags.alpha, flags.sample_root)
    if flags.acceptance == "lossless":
        temperature = 1.0 if flags.temperature is None else flags.temperature
        return Lossless(temperature, flags.top_k, flags.top_p)
    raise InputError(f"unknown acceptance {flags.acceptance!r}; expected {', '.join(SCHEMES)}")


def build(
    flags: argparse.Namespace,
    scheme: Acceptance,
    *,
    raw: bool = False,
    max_new_tokens: int | None = None,
    at_most: int = DEFAULT_NEW_TOKENS,
    need_heads: bool = True,
) -> Answerer:
    """Loads model and tokenizer; an `Answerer` with what the flags choose.

    Args:
      scheme: see `acceptance`; made first, since loading takes long.
      raw: never a chat template.
      max_new_tokens, at_most: see `answer.Limits`.
      need_heads: refuse a model without any; otherwise it is decoded plainly, with a warning.
    """
    model = load_model(flags.model, flags.heads, dtype(flags), flags.mesh)
    text = Text(model.directory, raw=raw, template=flags.chat_template)
    stop_ids = () if flags.ignore_eos else model.stop_ids + text.stop_ids
    stop_ids = tuple(sorted({*stop_ids, *flags.stop_id}))
    limits = Limits(max_new_tokens, flags.max_length, stop_ids, at_most)
    suppress = tuple(sorted({*model.suppress, *flags.suppress_tokens}))
    if need_heads or model.heads.num_heads:
        tree = choose_tree(flags, model, scheme)
    else:
        tree = Tree()
        if not flags.autoregressive:
            log.warning("no Medusa heads were found with %s: plain decoding", flags.model)
    return Answerer(model, text, tree, scheme, limits, seed=flags.seed, suppress=suppress)


def ranks(model: Model) -> int:
    """R, guesses of each head that a tree can be made of."""
    return min(MOST_RANKS, model.heads.truncated or model.config.vocab_size)


def grown(model: Model, size: int, depth: int | None = None) -> Grown:
    """Trees of `size` tokens grown at every step, at most `depth` deep (default: as the heads)."""
    deep = model.heads.num_heads if depth is None else depth
    # A node has no more children than that. Bigrams may lift a guess of a later rank, but to
    # ask for more ranks costs what these then accept.
    wide = max(size - 1, 1)
    return Grown(size, deep, min(ranks(model), wide))


def dtype(flags: argparse.Namespace) -> str:
    """The precision that the flags name, or what suits this machine."""
    return flags.dtype or ("bfloat16" if _accelerated() else "float32")


def choose_tree(flags: argparse.Namespace, model: Model, scheme: Acceptance) -> Tree | Grown:
    """The tree that the flags name."""
    num_heads = model.heads.num_heads
    if flags.autoregressive:
        return Tree()
    if not num_heads:
        raise InputError(
            f"no Medusa heads were found with {flags.model}: give --heads, or --autoregressive"
        )
    if flags.tree == "auto":
        found = tree_store.find(model, scheme, getattr(flags, "batch_size", 1), dtype(flags))
        return found or Tree.default(num_heads, _accelerated(), str(flags.model))
    if recipe := re.fullmatch(r"grow:(\d+)(?::(\d+))?", flags.tree):
        return grown(model, *(int(part) for part in recipe.groups() if part))
    if flags.tree in published_names():
        return Tree.published(flags.tree)
    if Path(flags.tree).is_file():
        return Tree.from_json(flags.tree)
    raise InputError(
        f"--tree {flags.tree}: neither auto, nor grow:SIZE, nor grow:SIZE:DEPTH, nor a JSON file, "
        f"nor one of {', '.join(published_names())}"
    )


def check_output(path: str | None) -> None:
    """Raises InputError where a file cannot be made at `path`."""
    if path and not Path(path).absolute().parent.is_dir():
        raise InputError(f"--output {path}: its directory does not exist")


def _accelerated() -> bool:
    return jax.default_backend() != "cpu"
