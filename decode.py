"""Decodes prompts with Medusa: text to stdout as it is made, one line of figures to stderr."""

import argparse
from pathlib import Path

import jax

from medusa_jax import cli, console
from medusa_jax.acceptance import SCHEMES, Acceptance, Greedy, Lossless, Typical
from medusa_jax.answer import Answerer, Limits
from medusa_jax.errors import InputError
from medusa_jax.hf import load_model
from medusa_jax.records import Request, count_requests, read_requests
from medusa_jax.text import Text
from medusa_jax.tree import Tree, published_names

EXAMPLE = "python decode.py --model DIR --heads DIR --prompt 'Once upon a time'"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where they are wrong."""
    parser = cli.parser(__doc__ or "", EXAMPLE)
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face directory or hub id, heads inside or not")
    add("--heads", help="directory, file or hub id of Medusa heads (default: the model's own)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="a text; may be given again")
    source.add_argument("--prompts", metavar="FILE", help="JSON Lines, one record a line")
    source.add_argument("--chat", action="store_true", help="talk to the model")
    add("--raw", action="store_true", help="no chat template: BOS and the text as it is")
    add("--chat_template", help="vicuna, zephyr or a Jinja file (default: the tokenizer's)")
    add("--tree", default="auto", help="a published name, a JSON file, or auto")
    add("--acceptance", default="greedy", help=" | ".join(SCHEMES))
    add("--temperature", type=float, help="default: 1.0 lossless, 0.7 typical")
    add("--top_k", type=int, default=0, help="lossless: tokens kept, 0 for all")
    add("--top_p", type=float, default=1.0, help="lossless: probability mass kept")
    add("--epsilon", type=float, default=0.09, help="typical: posterior threshold")
    add("--alpha", type=float, default=0.3, help="typical: factor of exp(-entropy)")
    add("--sample_root", action="store_true", help="typical: draw the root token")
    add("--seed", type=int, default=0)
    add("--autoregressive", action="store_true", help="plain decoding, one token a step")
    add("--compare", action="store_true", help="also decode plainly, and print the ratio")
    add("--max_new_tokens", type=int, help="default: what fits, at most 256")
    add("--max_length", type=int, help="prompt and text together (default: the context)")
    add("--num_samples", type=int, default=1, help="independent samples a prompt")
    add("--batch_size", type=int, default=1, help="rows decoded together")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    add("--ignore_eos", action="store_true", help="go on past end-of-sequence")
    add("--stop_id", type=int, action="append", default=[], help="another token that ends a text")
    add("--suppress_tokens", type=int, nargs="+", default=[], help="ids never to produce")
    add("--output", metavar="FILE", help="JSON Lines, one record a sample")
    return parser.parse_args(arguments)


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


def build(flags: argparse.Namespace) -> Answerer:
    """Loads the model and returns an `Answerer` for it."""
    scheme = acceptance(flags)  # flags first: loading takes long
    for name in ("num_samples", "batch_size"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(flags, name)}")
    if flags.output and not Path(flags.output).absolute().parent.is_dir():
        raise InputError(f"--output {flags.output}: its directory does not exist")
    accelerated = jax.default_backend() != "cpu"
    dtype = flags.dtype or ("bfloat16" if accelerated else "float32")
    model = load_model(flags.model, flags.heads, dtype)
    text = Text(model.directory, raw=flags.raw, template=flags.chat_template)
    if flags.chat and text.template is None and not flags.raw:
        raise InputError(
            "--chat: the tokenizer has no chat template; give --chat_template or --raw"
        )
    stop_ids = () if flags.ignore_eos else model.stop_ids + text.stop_ids
    limits = Limits(
        flags.max_new_tokens, flags.max_length, tuple(sorted({*stop_ids, *flags.stop_id}))
    )
    suppress = tuple(sorted({*model.suppress, *flags.suppress_tokens}))
    tree = choose_tree(flags, model.heads.num_heads, accelerated)
    return Answerer(model, text, tree, scheme, limits, seed=flags.seed, suppress=suppress)


def choose_tree(flags: argparse.Namespace, num_heads: int, accelerated: bool) -> Tree:
    """The tree that the flags name."""
    if flags.autoregressive:
        return Tree()
    if not num_heads:
        raise InputError(
            f"no Medusa heads were found with {flags.model}: give --heads, or --autoregressive"
        )
    if flags.tree == "auto":
        return Tree.default(num_heads, accelerated, flags.model)
    if flags.tree in published_names():
        return Tree.published(flags.tree)
    if Path(flags.tree).is_file():
        return Tree.from_json(flags.tree)
    raise InputError(
        f"--tree {flags.tree}: neither auto, nor a JSON file, nor one of "
        f"{', '.join(published_names())}"
    )


def main(flags: argparse.Namespace) -> None:
    """Loads the model, then chats or decodes."""
    answerer = build(flags)
    if flags.chat:
        console.chat(answerer)
        return
    requests, total = map(Request.of_text, flags.prompt or ()), None
    if flags.prompts:
        requests, total = read_requests(flags.prompts), count_requests(flags.prompts)
    console.decode(
        answerer,
        requests,
        num_samples=flags.num_samples,
        batch_size=flags.batch_size,
        output=flags.output,
        show=not (flags.prompts and flags.output),
        compare=flags.compare,
        total=total,
    )


if __name__ == "__main__":
    cli.run(main, parse())
