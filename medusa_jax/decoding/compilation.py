"""How decoding is compiled for a device: with which options, and for which order of weights.

A TPU's compiler would copy a third of Llama's weights into another order in each step, were they
stored row by row. So the loop is compiled once with orders left open; weights are then moved to
those that it chose, and all programs are compiled for these. On other devices row by row is fast.
"""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.prompt_blocks import RowSettings
from medusa_jax.decoding.sampling import row_keys
from medusa_jax.drafting.drafter import Params
from medusa_jax.model.weight import quantized

# A TPU's products of the 64 rows of a tree want more of its memory on chip than the usual 16 MiB:
# with these, they take as long as those of 8 rows. With more, a v6e has no room there for what an
# MLP makes of 16 trees.
TPU_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": str(48 * 1024)}
# Else a GPU's compiler splits the sums of long products, and adds the parts in further kernels: on
# an H200 a step of 64 rows took 5% longer. Steps of 4 rows take 6% longer without the split, and
# products of 64 rows by a narrow weight of long sums twice as long.
GPU_OPTIONS = {"xla_gpu_experimental_force_split_k": "1"}
TILE_ROWS = 16  # of a GPU's products; with more rows, enough programs share a product
CAPACITY = 512  # tokens of the cache that the question is asked with: hardly any weight minds


def platform(params: Params) -> str:
    """That of the devices of these arrays, or abstract arrays."""
    for leaf in jax.tree.leaves(params):
        if leaf.sharding is not None:
            return next(iter(leaf.sharding.device_set)).platform
    return jax.default_backend()


def on_tpu(params: Params) -> bool:
    """Whether these arrays, or abstract arrays, are on TPUs."""
    return platform(params) == "tpu"


def compiler_options(params: Params, rows: int = 1) -> dict[str, str] | None:
    """What a program of decoding is compiled with, for the devices of the parameters.

    Args:
      rows: of its products, where it is a loop of steps.
    """
    whole = rows > TILE_ROWS and not quantized(params)
    options = {"tpu": TPU_OPTIONS, "gpu": GPU_OPTIONS if whole else None}
    return options.get(platform(params))


def compile_run(decoder: Decoder, params: Params, state: Any, *, open_order: bool = False) -> Any:
    """`Decoder.run`, compiled as engines compile it; arguments as those of `lower_run`."""
    lowered = lower_run(decoder, params, state, open_order=open_order)
    return lowered.compile(compiler_options(params, len(state.root) * decoder.drafter.size))


def lower_run(decoder: Decoder, params: Params, state: Any, *, open_order: bool) -> Any:
    """`Decoder.run`, lowered.

    Args:
      params, state: arrays, or abstract arrays.
      open_order: leave the order of each weight to the compiler, whose choice is among the
        `input_formats` of what is compiled.
    """
    limit = decoder.network.abstract(jax.ShapeDtypeStruct((), jnp.int32))
    if not open_order:
        return Decoder.run.lower(decoder, params, state, limit, limit)
    formats = jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), params)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params
    )
    run = jax.jit(
        inspect.unwrap(Decoder.run),
        static_argnames="self",
        donate_argnames="state",
        in_shardings=(formats, None, None, None),
    )
    return run.lower(decoder, shapes, state, limit, limit)


def chosen_formats(decoder: Decoder, params: Params, rows: int) -> Params:
    """The order and place of each weight that the loop for so many rows reads fastest."""
    small = dataclasses.replace(decoder, capacity=min(decoder.capacity, CAPACITY))
    state = abstract_state(small, params, rows)
    given = compile_run(small, params, state, open_order=True).input_formats[0][0]

    def chosen(leaf: Any, asked: Any) -> Any:  # the loop does not read all parameters
        unread = asked is None or asked.layout is None
        return Format(leaf.format.layout, leaf.sharding) if unread else asked

    return jax.tree.map(chosen, params, given)


def in_fast_order(decoder: Decoder, params: Params, rows: int) -> Params:
    """The parameters in the order that this decoder's loop reads fastest.

    A weight that moves is deleted in its old place, so that no two copies of the model exist.
    Only TPUs care for the order; elsewhere nothing is done.
    """
    if not on_tpu(params):
        return params

    def moved(leaf: Any, wanted: Format) -> Any:
        if leaf.format.layout == wanted.layout:
            return leaf
        new = jax.device_put(leaf, wanted)
        leaf.delete()
        return new

    return jax.tree.map(moved, params, chosen_formats(decoder, params, rows))


def abstract_inputs(decoder: Decoder, rows: int, prompt_tokens: int) -> tuple[Any, ...]:
    """Abstract arguments of `Decoder.run_prefill`, but the parameters."""
    keys = jax.eval_shape(lambda: row_keys(0, [(row, 0) for row in range(rows)]))
    numbers = [(rows, prompt_tokens), (rows,), (rows,), (rows, 1)]  # tokens to stop ids
    inputs = (*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in numbers), keys)
    return decoder.network.abstract(inputs)


def abstract_state(decoder: Decoder, params: Params, rows: int) -> Any:
    """The abstract state of so many rows."""
    shapes = decoder.empty.eval_shape(decoder, params, rows, RowSettings())
    return decoder.network.abstract(shapes)
