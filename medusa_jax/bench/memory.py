"""Bytes per device of prefill and decoding steps, by the compiler of a machine that is not here.

Nothing runs, and no weights are read: shapes alone are compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from medusa_jax.bench.synthetic import abstract_model
from medusa_jax.bench.timing import trees
from medusa_jax.cli import runner
from medusa_jax.decoding.compilation import abstract_inputs, abstract_state
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.distributed.aot import DoesNotFit, Memory, compile_for
from medusa_jax.distributed.rules import decode_mesh
from medusa_jax.distributed.topology import devices
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.presets import PRESETS
from medusa_jax.options import option

EXAMPLE = """python -m medusa_jax.bench memory --model llama2-7b --compile_only v5e:2x2 \\
      --mesh tensor=4"""
LONGEST = 2048  # tokens of a row, where neither the options nor a shorter context say so


@dataclasses.dataclass(kw_only=True)
class MemoryOptions:
    """What to compile, and for which machine."""

    model: str = option(metavar="SHAPE", help=", ".join(PRESETS))
    compile_only: str = option(metavar="TOPOLOGY", help="v5e:2x2, v6e:2x4, ..., or cpu:8")
    mesh: str = option("tensor=1", metavar="tensor=N", help="devices of it that split the work")
    sizes: list[int] = option([1, 4, 8, 16, 32, 64], least=1, nargs="+", help="tokens of a tree")
    batch_sizes: list[int] = option([1, 4, 16], least=1, nargs="+", help="rows of a step")
    prompt_tokens: int = option(512, least=1, help="of each prompt of the prefill")
    max_length: int | None = option(None, least=2, help="prompt and text together (default: the "
        f"context, at most {LONGEST})")  # fmt: skip
    dtype: str = option("bfloat16", choices=("float32", "bfloat16"), help="of all parameters")
    heads_number: int = option(4, least=1, help="Medusa heads")
    shared_heads: bool = option(False, help="heads that use the backbone's lm_head")


def bench(options: MemoryOptions) -> dict[str, Memory]:
    """Memory of each batch size's prefill and of the step of each tree; printed as they come.

    Raises:
      InputError: shape, topology, mesh or capacity are wrong.
      DoesNotFit: some need more than a chip's memory; raised after all were tried.
    """
    if options.model not in PRESETS:
        raise InputError(f"--model {options.model}: expected one of {', '.join(PRESETS)}")
    config = PRESETS[options.model]
    size = (config.hidden_size, config.vocab_size)
    heads = HeadsConfig(options.heads_number, 1, *size, shared=options.shared_heads)
    mesh = decode_mesh(options.mesh, config, devices(options.compile_only))
    decoders = decoders_of(config, heads, mesh, options.sizes, options.max_length)
    params = abstract_model(config, heads, mesh, dtype=options.dtype)
    compiled: dict[str, Memory] = {}
    short = 0
    for batch in options.batch_sizes:
        for name, lower in lowerings(decoders, params, batch, options.prompt_tokens):
            name = f"{name}, batch {batch}"
            title = f"{options.compile_only} ({options.mesh}), {name}"
            try:
                compiled[name] = Memory.of(compile_for(options.compile_only, title, mesh, lower))
            except DoesNotFit as error:
                print(error, flush=True)
                short += 1
    if short:
        raise DoesNotFit(f"{short} of these do not fit {options.compile_only}")
    return compiled


def decoders_of(
    config: ModelConfig,
    heads: HeadsConfig,
    mesh: Mesh,
    sizes: Sequence[int],
    max_length: int | None = None,
) -> list[Decoder]:
    """A decoder for each size of a tree; the root alone is plain decoding.

    Raises:
      InputError: no tree has such a size, or `max_length` exceeds the context.
    """
    capacity = max_length or min(config.context, LONGEST)
    decoders = [
        Decoder(config, drafter_of_heads(heads, tree), capacity=capacity, mesh=mesh)
        for tree in trees(sizes, heads.num_heads)
        if tree.size in sizes
    ]
    if not decoders:
        raise InputError(f"--sizes: no tree has {list(sizes)} tokens")
    return decoders


def lowerings(
    decoders: Sequence[Decoder], params: Any, batch: int, prompt_tokens: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names, and what lowers: the prefill for the last decoder, then the step of each.

    Args:
      params: abstract parameters, placed on the mesh of the decoders.
    """
    for decoder in reversed(decoders):
        if decoder is decoders[-1]:
            inputs = abstract_inputs(decoder, batch, prompt_tokens)
            prefill = functools.partial(Decoder.run_prefill.lower, decoder, params, *inputs)
            yield f"prefill of {prompt_tokens}", prefill
        state = abstract_state(decoder, params, batch)
        step = functools.partial(Decoder.step.lower, decoder, params, state)
        yield f"step of {decoder.drafter.size}", step


def _print(options: MemoryOptions) -> None:
    bench(options)


def main(arguments: list[str]) -> None:
    """`python -m medusa_jax.bench memory`."""
    runner.command(_print, MemoryOptions, __doc__ or "", EXAMPLE, arguments)
