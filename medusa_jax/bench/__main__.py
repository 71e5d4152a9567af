"""Speed and acceptance over prompt sets: Medusa beside plain decoding and Hugging Face.

All systems decode the same prompt ids in the same process, prompt by prompt, in
an order that rotates, and all of it several times: a machine whose speed drifts
hurts all alike. Ratios are taken within a repeat; figures are medians over the
repeats, with their extremes. Compilation and a first pass of each system are
not timed. A conversation's history holds Medusa's own answers.

With --random_weights the step of a shape is timed over the size of the tree,
without any model at hand and so without acceptance.
"""

import argparse
import copy
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medusa_jax.bench.aot import compile_decoding
from medusa_jax.bench.measure import make_jobs, make_systems, measure
from medusa_jax.bench.peers import PEERS, HuggingFace, available
from medusa_jax.bench.report import markdown, plots
from medusa_jax.bench.summary import about, copy_bandwidth, histogram, summarise
from medusa_jax.bench.synthetic import TREE, time_steps, trees
from medusa_jax.checkpoints.tensors import write_json
from medusa_jax.cli import decoding_flags, runner
from medusa_jax.data.prompts import Request, read_requests
from medusa_jax.decoding.acceptance import Acceptance
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.presets import PRESETS
from medusa_jax.progress import progress
from medusa_jax.serving.generator import Answerer

EXAMPLE = """python -m medusa_jax.bench --model DIR --heads DIR --prompts question.jsonl \\
      --acceptance greedy,lossless --output out/bench
  python -m medusa_jax.bench --random_weights llama2-7b --batch_sizes 1 4 --output out/steps"""

_COUNTS = ("batch_size", "repeats", "max_new_tokens", "heads_number", "sizes", "batch_sizes")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where they are wrong."""
    parser = runner.parser((__doc__ or "").partition("\n")[0], EXAMPLE)
    decoding_flags.add_flags(parser)  # --acceptance takes several here
    add = parser.add_argument
    add("--prompts", action="append", metavar="FILE", help="MT-bench, Spec-Bench or any JSON Lines "
        "that decode.py reads; may be given again (default: the shipped model's)")  # fmt: skip
    add("--max_prompts", type=int, default=0, help="of each file; 0 for all")
    add("--raw", action="store_true", help="no chat template: BOS and the text as it is")
    add("--max_new_tokens", type=int, help="default: 128, or 32 with random weights")
    add("--batch_size", type=int, default=1, help="prompts decoded together")
    add("--repeats", type=int, default=3)
    add("--peers", nargs="+", choices=(*PEERS, "none"), help="default: all where torch is there")
    add("--output", metavar="DIR", help="bench.json, bench.md and plots; needed to measure")
    add("--random_weights", choices=PRESETS, help="time steps of this shape instead")
    add("--sizes", type=int, nargs="+", default=(1, 4, 8, 16, 32, 64), help="tokens of a tree")
    add("--batch_sizes", type=int, nargs="+", default=(1, 4, 16))
    add("--heads_number", type=int, default=4)
    add("--shared_heads", action="store_true", help="heads that use the backbone's lm_head")
    add("--histogram", metavar="FILE", help="accepted lengths measured elsewhere: a bench.json, "
        "or a JSON list of how many steps made 1, 2, 3, ... tokens")  # fmt: skip
    add("--compile_only", metavar="TOPOLOGY", help="with --random_weights: v5e:2x2, v6e:2x4, ..., "
        "cpu:8: compile prefill and steps for it, print bytes per device, run nothing")  # fmt: skip
    add("--prompt_tokens", type=int, default=512, help="--compile_only: length of the prompt")
    flags = parser.parse_args(arguments)
    if flags.compile_only and not flags.random_weights:
        parser.error("--compile_only needs the name of a shape: --random_weights")
    if not flags.output and not flags.compile_only:
        parser.error("--output is needed")
    return flags


def main(flags: argparse.Namespace) -> None:
    """Measures, prints the table and writes the report; or only compiles."""
    if flags.compile_only:
        compile_report(flags)
        return
    check(flags)
    if flags.max_new_tokens is None:
        flags.max_new_tokens = 32 if flags.random_weights else 128
    report = random_report(flags) if flags.random_weights else prompts_report(flags)
    text = markdown(report)
    print(text)
    directory = Path(flags.output)
    directory.mkdir(exist_ok=True)
    write_json(directory / "bench.json", report)
    (directory / "bench.md").write_text(text + "\n", encoding="utf-8")
    drawn = plots(report, directory)
    print(f"{directory}: bench.json, bench.md, {', '.join(drawn)}", file=sys.stderr)


def check(flags: argparse.Namespace) -> None:
    """Raises InputError for flags that cannot be, before anything takes long."""
    decoding_flags.check_output(flags.output)
    if Path(flags.output).exists() and not Path(flags.output).is_dir():
        raise InputError(f"--output {flags.output} is no directory")
    for name in _COUNTS:
        given = getattr(flags, name)
        least = min(given) if isinstance(given, Sequence) else given
        if least is not None and least < 1:
            raise InputError(f"--{name} must be at least 1, got {least}")
    if flags.max_prompts < 0:
        raise InputError(f"--max_prompts must not be negative, got {flags.max_prompts}")
    if flags.peers and "none" in flags.peers and len(flags.peers) > 1:
        raise InputError("--peers none goes with no other peer")
    if flags.random_weights:
        return
    if flags.histogram:
        raise InputError("--histogram goes with --random_weights; prompts have their own")


# --- prompts ----------------------------------------------------------------------------------


def prompts_report(flags: argparse.Namespace) -> dict[str, Any]:
    """Decodes the prompts with every system; the report."""
    schemes = acceptances(flags)  # flags and files first: loading takes long
    requests = read(flags)
    peers = chosen_peers(flags)
    bandwidth = copy_bandwidth()
    medusa = answerers(flags, schemes)
    jobs = list(make_jobs(medusa, requests, flags.batch_size))
    reference = None
    if peers:
        some = next(iter(medusa.values()))
        ends = (some.limits.stop_ids, some.suppress)
        reference = HuggingFace(some.model.directory, decoding_flags.dtype(flags), *ends)
        reference.choose_threads(jobs[0].prompts[0])
    systems = make_systems(medusa, reference, peers, flags.batch_size)
    runs = list(measure(jobs, systems, flags.repeats))
    chosen = {name: answerer.tree for name, answerer in medusa.items()}
    return about() | {
        "kind": "prompts",
        "dtype": decoding_flags.dtype(flags),
        "mesh": flags.mesh,
        "model": str(flags.model),
        "heads": flags.heads,
        "prompts": flags.prompts,
        "max_new_tokens": flags.max_new_tokens,
        "ignore_eos": flags.ignore_eos,
        "batch_size": flags.batch_size,
        "repeats": flags.repeats,
        "schemes": {name: str(scheme) for name, scheme in schemes.items()},
        "trees": {name: dataclasses.asdict(tree) for name, tree in chosen.items()},
        "torch_threads": reference and reference.threads,
        "copy_bandwidth": bandwidth,
        "rows": summarise(jobs, runs, chosen, bandwidth),
    }


def answerers(flags: argparse.Namespace, schemes: dict[str, Acceptance]) -> dict[str, Answerer]:
    """One model with each acceptance, and the tree that is chosen for it."""
    first, *others = schemes
    at_most = flags.max_new_tokens
    built = decoding_flags.build(
        flags, schemes[first], raw=flags.raw, at_most=at_most, need_heads=False
    )
    model, made = built.model, {first: built}
    for name in others:
        scheme = schemes[name]
        tree = decoding_flags.choose_tree(flags, model, scheme) if model.heads.num_heads else Tree()
        made[name] = built.with_tree(tree, acceptance=scheme)
    return made


def acceptances(flags: argparse.Namespace) -> dict[str, Acceptance]:
    """The schemes that --acceptance lists, by name."""
    made = {}
    for name in flags.acceptance.split(","):
        one = copy.copy(flags)
        one.acceptance = name.strip()
        made[one.acceptance] = decoding_flags.acceptance(one)
    return made


def read(flags: argparse.Namespace) -> list[Request]:
    """The prompts of all files; those without a category take the name of their file."""
    found = []
    for file in flags.prompts or [str(decoding_flags.shipped("prompts.jsonl"))]:
        some = list(itertools.islice(read_requests(file), flags.max_prompts or None))
        if not some:
            raise InputError(f"--prompts {file} holds no prompts")
        name = Path(file).name.partition(".")[0]
        found += [dataclasses.replace(one, category=one.category or name) for one in some]
    return found


def chosen_peers(flags: argparse.Namespace) -> list[str]:
    """The peers to run; Hugging Face's prompt lookup knows no batches."""
    if flags.peers:
        asked = [peer for peer in flags.peers if peer != "none"]
        if asked and not available():
            raise InputError("--peers: torch is missing: pip install 'medusa_jax[torch]'")
        if asked and flags.batch_size > 1:
            raise InputError("--peers run at batch size 1 only; give --peers none")
        return asked
    return list(PEERS) if flags.batch_size == 1 and available() else []


# --- random weights ---------------------------------------------------------------------------


def random_report(flags: argparse.Namespace) -> dict[str, Any]:
    """Times steps with random weights; the report."""
    accepted, origin = histogram(Path(flags.histogram)) if flags.histogram else (None, None)
    config, bandwidth = PRESETS[flags.random_weights], copy_bandwidth()
    heads = heads_of(flags, config)
    count = len(trees(flags.sizes, heads.num_heads)) * len(set(flags.batch_sizes))
    with progress(total=count * (flags.repeats + 1), label="timing", unit="runs") as bar:
        rows = time_steps(
            config,
            heads,
            decoding_flags.dtype(flags),
            sizes=flags.sizes,
            batch_sizes=flags.batch_sizes,
            new_tokens=flags.max_new_tokens,
            repeats=flags.repeats,
            copy_bandwidth=bandwidth,
            mesh=flags.mesh,
            tick=bar.update,
        )
    for row in rows:
        # Without a histogram nothing is said about tokens: a step's are not known.
        if accepted is not None:
            length = min(accepted, row["depth"] + 1)
            row["tokens_per_second"] = 1e3 * row["batch_size"] * length / row["step_ms"]["median"]
            row["speedup"] = length / row["step_overhead"]["median"]
    return about() | {
        "kind": "random_weights",
        "preset": flags.random_weights,
        "dtype": decoding_flags.dtype(flags),
        "mesh": flags.mesh,
        "tree": TREE,
        "heads": dataclasses.asdict(heads),
        "max_new_tokens": flags.max_new_tokens,
        "repeats": flags.repeats,
        "copy_bandwidth": bandwidth,
        "mean_accepted_length": accepted,
        "accepted_length_from": origin,
        "rows": rows,
    }


def compile_report(flags: argparse.Namespace) -> None:
    """Compiles prefill and steps for a machine that is not here; prints a line for each."""
    config = PRESETS[flags.random_weights]
    compile_decoding(
        config,
        heads_of(flags, config),
        flags.dtype or "bfloat16",
        flags.compile_only,
        flags.mesh or "tensor=1",
        sizes=flags.sizes,
        batch_sizes=flags.batch_sizes,
        prompt_tokens=flags.prompt_tokens,
        capacity=flags.max_length or min(config.context, 2048),
    )


def heads_of(flags: argparse.Namespace, config: ModelConfig) -> HeadsConfig:
    """Heads for a backbone of random weights."""
    size = (config.hidden_size, config.vocab_size)
    return HeadsConfig(flags.heads_number, 1, *size, shared=flags.shared_heads)


if __name__ == "__main__":
    runner.run(main, parse())
