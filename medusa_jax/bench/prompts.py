"""Speed and acceptance over prompt sets: Medusa beside plain decoding and Hugging Face.

All systems decode the same prompt ids in the same process, in an order that rotates, and
all of it several times. A machine whose speed drifts slows all systems alike. Ratios are
taken within a repeat; reported are medians over the repeats, with their extremes.
Compilation and a first pass of each system are not timed. The history of a conversation
holds Medusa's own answers.

Each run is kept in the output directory (`runs.jsonl`) until all are made, and the report is
written after each prompt. So a run that was stopped goes on.
"""

import dataclasses
import hashlib
import itertools
from pathlib import Path
from typing import Any

import jax

from medusa_jax import json_files
from medusa_jax.bench.measure import (
    MEDUSA,
    Generators,
    Measurement,
    Systems,
    Task,
    make_systems,
)
from medusa_jax.bench.output import write_report
from medusa_jax.bench.peers import PEERS, HuggingFace, available
from medusa_jax.bench.summary import about, copy_bandwidth, summarise
from medusa_jax.checkpoints.hub import shipped
from medusa_jax.cli import runner
from medusa_jax.data.prompts import Request, read_requests
from medusa_jax.decoding.acceptance import Acceptance
from medusa_jax.errors import InputError, listed
from medusa_jax.files import check_directory
from medusa_jax.options import option
from medusa_jax.progress import say
from medusa_jax.serving import tree_store
from medusa_jax.serving.drafters import DRAFTERS
from medusa_jax.serving.generator import Generator, load_generator
from medusa_jax.serving.options import DecodingOptions, acceptance_of, tree_of
from medusa_jax.tuning.clock import clock
from medusa_jax.tuning.journal import Journal

EXAMPLE = """python -m medusa_jax.bench prompts --model DIR --heads DIR --prompts question.jsonl \\
      --acceptance greedy,lossless --output out/bench
other programs, each with its own --help:
  python -m medusa_jax.bench steps --model llama2-7b --sizes 1 8 64 --output out/steps
  python -m medusa_jax.bench memory --model llama2-7b --compile_only v5e:2x2 --mesh tensor=4"""


@dataclasses.dataclass(kw_only=True)
class PromptsOptions(DecodingOptions):
    """What to decode, how often, and beside which other systems."""

    acceptance: str | Acceptance = option("greedy", help="greedy, lossless, typical, or several "
        "with commas between")  # fmt: skip
    prompts: list[str] | None = option(None, action="append", metavar="FILE", help="MT-bench, "
        "Spec-Bench or any JSON Lines that decode.py reads; may be given again (default: those "
        "that ship with the project)")  # fmt: skip
    max_prompts: int = option(0, least=0, help="of each file; 0 for all")
    max_new_tokens: int | None = option(128, least=1, help="of each text, if they fit")
    repeats: int = option(3, least=1, help="times that everything is decoded")
    minutes: float | None = option(None, least=0, help="begin nothing new after so many, loading "
        "left out; a later run with this output goes on")  # fmt: skip
    drafters: str | None = option(None, metavar="NAMES", help="drafters to measure beside "
        "each other, with commas between, as --drafter names them (default: its own)")  # fmt: skip
    peers: list[str] | None = option(None, nargs="+", choices=(*PEERS, "none"), help="default: "
        "all where torch is installed")  # fmt: skip
    output: str = option(metavar="DIR", help="bench.json, bench.md and plots")


# What may differ between a run and the run that goes on with it.
FREE = ("minutes", "output", "debug", "repeats", "acceptance")
RUNS = "runs.jsonl"


def bench(options: PromptsOptions) -> None:
    """Measures, prints the table and writes the report.

    Raises:
      InputError: an option is wrong, or no prompt can be decoded.
    """
    check_directory(options.output)
    schemes = acceptances(options)  # options and files first: loading takes long
    drafter_names(options)
    requests = read(options)
    peers = chosen_peers(options)
    bandwidth = copy_bandwidth()
    asked = generators(options, schemes)
    over = clock(options.minutes)
    reference: HuggingFace | None = None

    def systems(task: Task) -> Systems:
        nonlocal reference
        reference = load_peer(options, first_of(asked), task.prompts[0]) if peers else None
        return make_systems(asked, reference, peers)

    directory = Path(options.output)
    directory.mkdir(exist_ok=True)
    with Journal(directory / RUNS, purpose(options, asked, requests, peers)) as journal:
        measured = Measurement(asked, requests, systems, journal)

        def report() -> dict[str, Any]:
            machine = about() | {"copy_bandwidth": bandwidth}
            threads = {"torch_threads": reference and reference.threads}
            found = rows(measured, asked, bandwidth, options.repeats)
            return machine | describe(options, schemes, asked) | threads | found

        for repeat in measured.run(options.repeats, over):
            if not repeat:  # later repeats count once they are whole
                json_files.write(directory / "bench.json", report())
        write_report(report(), options.output)
        if measured.complete(options.repeats):
            journal.remove()
        else:
            say(f"{options.minutes} minutes are over: the same command goes on from here")


def describe(
    options: PromptsOptions, schemes: dict[str, Acceptance], asked: Generators
) -> dict[str, Any]:
    """What was measured."""
    firsts = {name: next(iter(own.values())) for name, own in asked.items()}
    return {
        "kind": "prompts",
        "dtype": options.precision,
        "quantize": options.quantize,
        "mesh": options.mesh,
        "model": str(options.model or shipped()),
        "heads": options.heads,
        "drafters": options.drafters,
        "prompts": options.prompts,
        "max_new_tokens": options.max_new_tokens,
        "ignore_eos": options.ignore_eos,
        "batch_size": options.batch_size,
        "schemes": {name: str(scheme) for name, scheme in schemes.items()},
        "trees": {name: dataclasses.asdict(one.tree) for name, one in firsts.items()},
    }


def rows(
    measured: Measurement, asked: Generators, bandwidth: float, repeats: int
) -> dict[str, Any]:
    """The rows of the report, of the repeats that are whole."""
    whole = measured.whole_repeats
    drafters = {
        acceptance: {name: one.engine.decoder.drafter for name, one in own.items()}
        for acceptance, own in asked.items()
    }
    runs = [run for run in measured.runs if run.repeat < whole]
    return {
        "repeats": whole,
        "complete": measured.complete(repeats),
        "rows": summarise(measured.tasks, runs, drafters, bandwidth),
    }


def purpose(
    options: PromptsOptions, asked: Generators, requests: list[Request], peers: list[str]
) -> dict[str, Any]:
    """What runs depend on: model, heads, device, precision, options, prompts and peers."""
    model = first_of(asked).model
    chosen = {name: str(value) for name, value in vars(options).items() if name not in FREE}
    said = [dataclasses.replace(request, origin="") for request in requests]
    decoders = {
        acceptance: {name: repr(one.engine.decoder) for name, one in own.items()}
        for acceptance, own in asked.items()
    }
    return {
        **chosen,
        **tree_store.conditions(model, model.precision),
        "fingerprint": model.fingerprint,
        "decoders": decoders,
        "contents": hashlib.sha256(repr(said).encode()).hexdigest()[:16],
        "peers": peers,
        "jax": jax.__version__,
    }


def acceptances(options: PromptsOptions) -> dict[str, Acceptance]:
    """The schemes that `acceptance` lists, by name."""
    names = [name.strip() for name in str(options.acceptance).split(",")]
    return {name: acceptance_of(dataclasses.replace(options, acceptance=name)) for name in names}


def read(options: PromptsOptions) -> list[Request]:
    """The prompts of all files; those without a category take the name of their file."""
    requests: list[Request] = []
    for file in options.prompts or [str(shipped("prompts.jsonl"))]:
        own = list(itertools.islice(read_requests(file), options.max_prompts or None))
        if not own:
            raise InputError(f"--prompts {file} holds no prompts")
        name = Path(file).name.partition(".")[0]
        requests += [dataclasses.replace(r, category=r.category or name) for r in own]
    return requests


def chosen_peers(options: PromptsOptions) -> list[str]:
    """The peers to run, which decode prompt by prompt only."""
    if options.peers is None:
        return list(PEERS) if options.batch_size == 1 and available() else []
    asked = [peer for peer in options.peers if peer != "none"]
    if "none" in options.peers and asked:
        raise InputError("--peers none goes with no other peer")
    if asked and not available():
        raise InputError("--peers: torch is missing: pip install 'medusa_jax[torch]'")
    if asked and options.batch_size > 1:
        raise InputError("--peers run at batch size 1 only; give --peers none")
    return asked


def generators(options: PromptsOptions, schemes: dict[str, Acceptance]) -> Generators:
    """The model with each acceptance and drafter, and the tree that is chosen for it."""
    asked: Generators = {scheme: {} for scheme in schemes}
    backbone: Any = None
    for name in drafter_names(options) or [options.drafter]:
        for scheme, one in with_drafter(options, schemes, name).items():
            parameters = one.model.parameters  # all drafters share a single copy of the backbone
            backbone = backbone or parameters.part("backbone")
            model = dataclasses.replace(one.model, parameters=parameters.having(backbone=backbone))
            rest = one.text, one.tree, one.acceptance, one.options, one.at_most
            asked[scheme][name or MEDUSA] = Generator(model, *rest)
    return asked


def drafter_names(options: PromptsOptions) -> list[str]:
    """The drafters that are measured beside each other; none where --drafters is not given.

    Raises:
      InputError: there is no such drafter, or it is named twice.
    """
    if options.drafters is None:
        return []
    names = [name.strip() for name in options.drafters.split(",")]
    if options.drafter:
        raise InputError("--drafter goes with no --drafters: name all of them there")
    if unknown := [name for name in names if name.partition(":")[0] not in DRAFTERS]:
        raise InputError(f"--drafters: no drafter {unknown[0]!r}; known: {listed(DRAFTERS)}")
    if len(set(names)) < len(names):
        raise InputError(f"--drafters {options.drafters}: each is measured once")
    return names


def with_drafter(
    options: PromptsOptions, schemes: dict[str, Acceptance], drafter: str | None
) -> dict[str, Generator]:
    """The model with a drafter, and each acceptance."""
    first, *others = schemes
    # A prompt that leaves less room than --max_new_tokens gets a shorter text.
    changed: dict[str, Any] = {"drafter": drafter, "max_new_tokens": None}
    decoding = dataclasses.replace(options, acceptance=schemes[first], **changed)
    loaded = load_generator(decoding, at_most=options.max_new_tokens or 1, need_heads=False)
    by_scheme = {first: loaded}
    for name in others:
        tree = loaded.tree
        if loaded.model.heads.num_heads or drafter:
            tree = tree_of(decoding, loaded.model, schemes[name])
        by_scheme[name] = loaded.with_tree(tree, schemes[name])
    return by_scheme


def first_of(asked: Generators) -> Generator:
    """The generator that answers the prompts of the first acceptance."""
    return next(iter(next(iter(asked.values())).values()))


def load_peer(options: PromptsOptions, generator: Generator, prompt: list[int]) -> HuggingFace:
    """Hugging Face's model, with as many threads as decode `prompt` fastest."""
    ends = generator.stop_ids, generator.suppress, generator.repetition_penalty
    peer = HuggingFace(generator.model.directory, options.precision, *ends)
    peer.choose_threads(prompt)
    return peer


def main(arguments: list[str]) -> None:
    """`python -m medusa_jax.bench prompts`."""
    runner.command(bench, PromptsOptions, __doc__ or "", EXAMPLE, arguments)
