"""How to decode: the options of a `Generator`, which command lines make flags."""

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from medusa_jax import kernels
from medusa_jax.checkpoints.load import Model
from medusa_jax.checkpoints.quantization import CHOICES, NONE
from medusa_jax.decoding.acceptance import SCHEMES, Acceptance, Greedy, Lossless, Typical
from medusa_jax.decoding.repetition import penalties
from medusa_jax.distributed.hardware import accelerated
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree, default_tree, published_names
from medusa_jax.errors import InputError
from medusa_jax.options import option
from medusa_jax.serving.drafters import from_heads
from medusa_jax.serving.quick_tree import auto_tree

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 256
CHAIN = 4  # guesses of a drafter without heads, where no tree is named
MOST_RANKS = 10  # guesses of each head that a static tree may use; the original's top-k
GROWN_RANKS = 24  # ... and that a grown tree may; a tree of 64 nodes accepts 4% more than with 10


@dataclasses.dataclass(kw_only=True)
class ModelOptions:
    """What to decode with, on what. The help of each field says what it is."""

    model: str | None = option(None, help="Hugging Face directory or hub id, with or without heads "
        "inside, GGUF file, or smollm2 (default: the small model of the package)")  # fmt: skip
    heads: str | None = option(None, help="directory, file or hub id of Medusa heads (default: "
        "those found with the model)")  # fmt: skip
    chat_template: str | None = option(None, help="vicuna, zephyr or a Jinja file (default: the "
        "tokenizer's)")  # fmt: skip
    drafter: str | None = option(None, help="what guesses: medusa, hydra, ngram, medusa+ngram, or "
        "draft:DIR, a smaller model of the same vocabulary; medusa:DIR and hydra:DIR name heads "
        "(default: the heads; with n-grams, where Medusa's tree is grown)")  # fmt: skip
    tree: str | Tree | DynamicTree = option("auto", help="auto: the tree tuned for this model and "
        "device; a published name; a JSON file; chain:DEPTH; grow:SIZE or grow:SIZE:DEPTH: grown "
        "anew at each step")  # fmt: skip
    autoregressive: bool = option(False, help="plain decoding, one token a step")
    max_length: int | None = option(None, help="prompt and text together (default: the context)")
    dtype: str | None = option(None, choices=("float32", "bfloat16"), help="default: float32 on a "
        "CPU, else bfloat16")  # fmt: skip
    quantize: str = option(NONE, choices=CHOICES, help="hold weights in fewer bits; needs qwix, "
        "of the extra [quantize]")  # fmt: skip
    mesh: str | None = option(None, metavar="tensor=N", help="split model and work over N devices "
        "(default: one)")  # fmt: skip
    no_kernels: list[str] | None = option(None, nargs="*", choices=kernels.NAMES, help="XLA's own "
        "products on a CPU, XLA's own attention to the cache (default: both)")  # fmt: skip
    debug: bool = False

    @property
    def precision(self) -> str:
        """The precision that `dtype` names, or the usual precision of this machine."""
        return self.dtype or ("bfloat16" if accelerated() else "float32")


@dataclasses.dataclass(kw_only=True)
class DecodingOptions(ModelOptions):
    """What to decode with, and how. `tree` and `acceptance` may also be objects.

    `serving.generator.Generator.load` takes all of them.

    Attributes:
      most_logprobs: see `decoding.decoder.Decoder`; no flag.
      by_load: the engine chooses its batch size and its tree by load; no flag.
    """

    most_logprobs: int | None = None
    by_load: bool = False
    raw: bool = option(False, help="no chat template: BOS and the text as it is")
    acceptance: str | Acceptance = option("greedy", help=" | ".join(SCHEMES))
    temperature: float | None = option(None, help="default: 1.0 lossless, 0.7 typical")
    top_k: int = option(0, help="lossless: tokens kept, 0 for all")
    top_p: float = option(1.0, help="lossless: probability mass kept")
    epsilon: float = option(0.09, help="typical: posterior threshold")
    alpha: float = option(0.3, help="typical: factor of exp(-entropy)")
    sample_root: bool = option(False, help="typical: draw the root token")
    seed: int = option(0, least=-(2**63), most=2**64 - 1, help="of all random draws")
    repetition_penalty: float | None = option(None, help="divides the logits of tokens that prompt "
        "or text hold, as transformers does (default: the model's own, else 1: none)")  # fmt: skip
    max_new_tokens: int | None = option(None, least=1, help=f"default: what fits, at most "
        f"{DEFAULT_NEW_TOKENS}")  # fmt: skip
    batch_size: int = option(1, least=1, help="rows decoded together: slots that prompts refill")
    ignore_eos: bool = option(False, help="go on past end-of-sequence")
    stop: list[str] = option([], action="append", metavar="TEXT", help="ends a text before this "
        "string; may be given again")  # fmt: skip
    stop_id: list[int] = option([], action="append", help="another token that ends a text")
    suppress_tokens: list[int] = option([], nargs="+", help="ids never to produce")


def acceptance_of(options: DecodingOptions) -> Acceptance:
    """The acceptance scheme that the options describe."""
    if not isinstance(options.acceptance, str):
        return options.acceptance
    if options.acceptance == "greedy":
        return Greedy()
    if options.acceptance == "typical":
        temperature = 0.7 if options.temperature is None else options.temperature
        return Typical(temperature, options.epsilon, options.alpha, options.sample_root)
    if options.acceptance == "lossless":
        temperature = 1.0 if options.temperature is None else options.temperature
        return Lossless(temperature, options.top_k, options.top_p)
    raise InputError(f"unknown acceptance {options.acceptance!r}; expected {', '.join(SCHEMES)}")


def check_ends(options: DecodingOptions) -> None:
    """Raises InputError for a stop string or a penalty that means nothing."""
    if "" in options.stop:
        raise InputError("stop is an empty string; expected a text that ends an answer")
    if options.repetition_penalty is not None:
        penalties(options.repetition_penalty, 1)


def check_tokens(
    options: DecodingOptions, stop_ids: Sequence[int], suppress: Sequence[int], vocab_size: int
) -> None:
    """Raises InputError where the options name ids beyond the vocabulary, or nothing is left.

    Args:
      stop_ids, suppress: with those of the model.
    """
    for name in ("stop_id", "suppress_tokens"):
        for token in getattr(options, name):
            if not 0 <= token < vocab_size:
                raise InputError(
                    f"{name} {token} must lie in 0..{vocab_size - 1}, the model's vocabulary"
                )
    if {*stop_ids, *suppress}.issuperset(range(vocab_size)):
        raise InputError(
            "suppress_tokens leaves no token but those that end a text; suppress fewer"
        )


def tree_of(options: DecodingOptions, model: Model, scheme: Acceptance) -> Tree | DynamicTree:
    """The tree that the options name; the root alone is plain decoding.

    Raises:
      InputError: the model has no heads, or the name of the tree means nothing.
    """
    if options.autoregressive:
        return Tree()
    num_heads = model.heads.num_heads
    if not num_heads and from_heads(options.drafter):
        raise InputError(
            f"no Medusa heads were found with {options.model}: give --heads, --drafter ngram, or "
            "--autoregressive"
        )
    tree = options.tree
    if not isinstance(tree, str):
        return tree
    if chain := re.fullmatch(r"chain:(\d{1,4})", tree):
        return Tree.chain(int(chain[1]))
    if tree == "auto" and not from_heads(options.drafter):
        return Tree.chain(CHAIN)
    if tree == "auto":
        rows = 1 if options.by_load else options.batch_size  # a ladder has smaller trees below it
        which = model, scheme, rows, model.precision
        tuned = auto_tree(*which, own_heads=options.heads is None)
        return tuned or default_tree(num_heads, accelerated(), str(options.model))
    if recipe := re.fullmatch(r"grow:(\d{1,99})(?::(\d{1,99}))?", tree):
        return dynamic_tree(model, *(int(part) for part in recipe.groups() if part))
    if tree in published_names():
        return Tree.published(tree)
    if Path(tree).is_file():
        return Tree.from_json(tree)
    raise InputError(
        f"--tree {tree}: neither auto, nor chain:DEPTH, nor grow:SIZE, nor grow:SIZE:DEPTH, nor a "
        f"JSON file, nor one of {', '.join(published_names())}"
    )


def usable_ranks(model: Model, most: int = MOST_RANKS) -> int:
    """R, guesses of each head that a tree may use, at most `most`."""
    return min(most, model.heads.truncated or model.config.vocab_size)


def dynamic_tree(model: Model, size: int, depth: int | None = None) -> DynamicTree:
    """Trees of `size` tokens grown at each step, at most `depth` deep (default: as the heads)."""
    deepest = model.heads.num_heads if depth is None else depth
    # No node has more children than that. Bigrams may lift a guess of a later rank, but to
    # ask for more ranks costs what these then accept.
    widest = max(size - 1, 1)
    return DynamicTree(size, deepest, min(usable_ranks(model, GROWN_RANKS), widest))
