"""The time of a decoding step over the size of its tree: of a model, or of random weights.

Sizes and batch sizes take turns, repeat by repeat, and ratios to plain decoding are taken
within a repeat. A model without heads gets random ones: a step's time depends on shapes
alone. What random heads guess means nothing, so acceptance is not measured.
"""

import dataclasses
import logging
from typing import Any

from medusa_jax import kernels
from medusa_jax.bench import compiled_steps
from medusa_jax.bench.output import write_report
from medusa_jax.bench.report import NO_ACCEPTANCE
from medusa_jax.bench.summary import about, copy_bandwidth
from medusa_jax.bench.synthetic import abstract_model, random_model, random_params
from medusa_jax.bench.timing import TREE, time_steps, trees
from medusa_jax.checkpoints.backbone import read_settings, settings_file
from medusa_jax.checkpoints.hub import resolve, shipped
from medusa_jax.checkpoints.load import load_model
from medusa_jax.checkpoints.quantization import CHOICES, NONE, check
from medusa_jax.checkpoints.weight_layout import usable
from medusa_jax.cli import runner
from medusa_jax.distributed.aot import DoesNotFit
from medusa_jax.distributed.hardware import accelerated
from medusa_jax.distributed.rules import decode_mesh
from medusa_jax.drafting.drafter import Params
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.files import check_directory
from medusa_jax.model.config import ModelConfig, from_hf
from medusa_jax.model.presets import PRESETS
from medusa_jax.options import option
from medusa_jax.progress import progress
from medusa_jax.tuning.clock import clock

log = logging.getLogger(__name__)

EXAMPLE = """python -m medusa_jax.bench steps --model llama2-7b --sizes 1 8 64 --batch_sizes 1 8 \\
      --output out/steps"""


@dataclasses.dataclass(kw_only=True)
class StepsOptions:
    """Which steps to time, and how often."""

    model: str | None = option(None, help="Hugging Face directory, hub id, GGUF file, or smollm2 "
        f"(default: the package's small model); random weights: {', '.join(PRESETS)}")  # fmt: skip
    random_weights: str | None = option(None, metavar="SHAPE", help="random weights, in the shape "
        "of one of these or of a directory's config.json")  # fmt: skip
    heads: str | None = option(None, help="directory, file or hub id of Medusa heads (default: "
        "those found with the model, else random ones)")  # fmt: skip
    heads_number: int = option(4, least=1, help="of random heads")
    shared_heads: bool = option(False, help="random heads use the backbone's lm_head")
    sizes: list[int] = option([1, 4, 8, 16, 32, 64], least=1, nargs="+", help="tokens of a tree")
    batch_sizes: list[int] = option([1, 4, 16], least=1, nargs="+", help="rows of a step")
    dtype: str | None = option(None, choices=("float32", "bfloat16"), help="default: float32 on a "
        "CPU, else bfloat16")  # fmt: skip
    compile_only: str | None = option(None, metavar="TOPOLOGY", help="time nothing: aot.json says "
        "what the compiler of v5e:2x2, v5p:1x1x1, ..., or h100 says of each step")  # fmt: skip
    quantize: str = option(NONE, choices=CHOICES, help="hold weights in fewer bits; needs qwix, "
        "of the extra [quantize]")  # fmt: skip
    mesh: str | None = option(None, metavar="tensor=N", help="split model and work over N devices "
        "(default: one)")  # fmt: skip
    no_kernels: list[str] | None = option(None, nargs="*", choices=kernels.NAMES, help="XLA's own "
        "products on a CPU, XLA's own attention to the cache (default: both)")  # fmt: skip
    max_length: int | None = option(None, least=2, help="tokens that the cache has room for "
        "(default: hardly more than the steps of a timing may make)")  # fmt: skip
    max_new_tokens: int = option(32, least=1, help="steps of a timing; each makes a token or more")
    repeats: int = option(3, least=1, help="rounds in which all sizes and batch sizes take turns")
    minutes: float | None = option(None, least=0, help="no further round after so many, loading "
        "left out")  # fmt: skip
    output: str = option(metavar="DIR", help="steps.json, bench.json, bench.md and a plot")

    @property
    def precision(self) -> str:
        """The precision that `dtype` names, or the usual precision of this machine."""
        return self.dtype or ("bfloat16" if accelerated() else "float32")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
      source: of the report: where weights come from, and what is random.
      note: the same for a reader.
    """

    config: ModelConfig
    heads: HeadsConfig
    params: Params
    mesh: Any
    source: dict[str, Any]
    note: str = ""


def bench(options: StepsOptions) -> None:
    """Times steps, prints the table and writes the report.

    Raises:
      InputError: an option is wrong.
    """
    check_directory(options.output)
    if options.random_weights and options.model:
        raise InputError("--random_weights names a shape: it goes with no --model")
    shape = options.random_weights or (options.model if options.model in PRESETS else None)
    if shape and options.heads:
        raise InputError(f"--heads: the weights of {shape} are random, and so its heads")
    if options.compile_only:
        return compile_only(options, options.compile_only)
    subject = random_subject(options, shape) if shape else load(options)
    bandwidth, over = copy_bandwidth(), clock(options.minutes)
    cases = len(trees(options.sizes, subject.heads.num_heads)) * len(set(options.batch_sizes))
    with progress(total=cases * (options.repeats + 1), label="timing", unit="runs") as bar:
        rows = time_steps(
            subject.config,
            subject.heads,
            subject.params,
            sizes=options.sizes,
            batch_sizes=options.batch_sizes,
            steps=options.max_new_tokens,
            repeats=options.repeats,
            copy_bandwidth=bandwidth,
            max_length=options.max_length,
            mesh=subject.mesh,
            kernels=kernels.used(options.no_kernels),
            tick=bar.update,
            over=over,
        )
    report = about() | subject.source | {
        "note": subject.note,
        "dtype": options.precision,
        "quantize": options.quantize,
        "mesh": options.mesh,
        "tree": TREE,
        "heads": dataclasses.asdict(subject.heads),
        "max_new_tokens": options.max_new_tokens,
        "max_length": options.max_length,
        "repeats": rows[0]["repeats"],
        "copy_bandwidth": bandwidth,
        "rows": rows,
    }  # fmt: skip
    write_report(report, options.output, steps=[record(row) for row in rows])


def compile_only(options: StepsOptions, topology: str) -> None:
    """Writes what the compiler of an absent machine says of the steps.

    Raises:
      InputError: an option is wrong.
      DoesNotFit: a step needs more memory than a device has; after all are written.
    """
    model = options.random_weights or options.model
    config, heads = compiled_steps.shapes_of(model, options.heads)
    records, short = compiled_steps.compile_steps(
        topology,
        str(model or shipped()),
        config,
        heads or random_heads(options, config),
        sizes=options.sizes,
        batch_sizes=options.batch_sizes,
        mesh=options.mesh or "tensor=1",
        dtype=options.dtype or "bfloat16",
        max_length=options.max_length,
    )
    compiled_steps.write(records, options.output)
    if short:
        raise DoesNotFit("; ".join(short))


def record(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `time_steps` as steps.json has it."""
    return {
        "size": row["nodes"],
        "batch": row["batch_size"],
        "seconds": row["step_ms"]["median"] / 1e3,
        "over_plain": row["step_overhead"]["median"],
    }


def random_subject(options: StepsOptions, shape: str) -> Subject:
    """Random weights in the shape of a preset, or of a model directory whose weights are not read.

    Raises:
      InputError: there is no such shape.
    """
    check(options.quantize)
    config = shape_of(shape)
    heads = random_heads(options, config)
    mesh = decode_mesh(options.mesh, config) if options.mesh else None
    products = "products" in kernels.used(options.no_kernels)
    layout: dict[str, Any] = {"few_rows": products and usable(mesh), "quantize": options.quantize}
    params = random_model(config, heads, options.precision, mesh, **layout)
    source = {"kind": "random_weights", "preset": shape}
    return Subject(config, heads, params, mesh, source, NO_ACCEPTANCE)


def shape_of(name: str) -> ModelConfig:
    """The shape of a preset or of a model, whose weights need not be there.

    Raises:
      InputError: it is neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    try:
        place = resolve(name)
        return from_hf(read_settings(place), str(settings_file(place)))
    except InputError as error:
        shapes = ", ".join(PRESETS)
        raise InputError(f"--random_weights {name}: no shape of {shapes}, and {error}") from None


def load(options: StepsOptions) -> Subject:
    """The model that the options name; its heads are random if there are none."""
    check(options.quantize)
    name = str(options.model or shipped())
    products = "products" in kernels.used(options.no_kernels)
    where = options.precision, options.mesh, products, options.quantize
    model = load_model(name, options.heads, *where)
    config, heads, params, note = model.config, model.heads, model.params, ""
    if not heads.num_heads:
        heads = random_heads(options, config)
        few_rows = products and usable(model.mesh)
        layout = {"few_rows": few_rows, "quantize": options.quantize, "dtype": options.precision}
        shapes = abstract_model(config, heads, model.mesh, **layout)
        params = params | {"heads": random_params(shapes["heads"])}
        note = f"{name} has no heads, so {heads.num_heads} random heads take their place."
        log.warning(note)
    source = {"kind": "steps", "model": name, "random_heads": bool(note)}
    return Subject(config, heads, params, model.mesh, source, note)


def random_heads(options: StepsOptions, config: ModelConfig) -> HeadsConfig:
    """The shape of random heads."""
    size = (config.hidden_size, config.vocab_size)
    return HeadsConfig(options.heads_number, 1, *size, shared=options.shared_heads)


def main(arguments: list[str]) -> None:
    """`python -m medusa_jax.bench steps`."""
    runner.command(bench, StepsOptions, __doc__ or "", EXAMPLE, arguments)
