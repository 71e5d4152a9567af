"""The parameters of a run: which there are, and how they come to their devices, part by part."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from medusa_jax.checkpoints.load import backbone_tensors, head_tensors, resolve
from medusa_jax.checkpoints.names import backbone_places, head_places
from medusa_jax.checkpoints.tensors import StoredTensor, read_json
from medusa_jax.distributed.rules import spec
from medusa_jax.drafting.medusa_heads import NO_HEADS, HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig, from_hf
from medusa_jax.model.presets import PRESETS
from medusa_jax.param_paths import nested
from medusa_jax.training import lora, scanned_backbone
from medusa_jax.training.optimizer import FROZEN, group_of, groups
from medusa_jax.training.settings import Config

TOKEN_MAP = "heads/token_map"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a run.

    Attributes:
      shape: its dimensions.
      dtype: float32 where it learns, else the computation's.
      group: of the optimizer.
    """

    shape: tuple[int, ...]
    dtype: str
    group: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model to train.

    Attributes:
      model, heads: shapes.
      trainable, frozen: nested parameters, on their devices.
    """

    model: ModelConfig
    heads: HeadsConfig
    trainable: dict[str, Any]
    frozen: dict[str, Any]

    def with_trained(self, trainable: dict[str, Any]) -> "Weights":
        """The same with other values of what learns."""
        return dataclasses.replace(self, trainable=trainable)


def model_shape(config: Config, *, absent: bool = False) -> ModelConfig:
    """The backbone's shape: that of `model.path`, or a preset's where it is empty or `absent`."""
    name, path = config.model.shape, config.model.path
    if name and name not in PRESETS:
        raise InputError(f"model.shape is {name!r}; expected {', '.join(PRESETS)}")
    if name and (absent or not path):
        return PRESETS[name]
    if not path:
        raise InputError("model.path names no model: give a directory or a hub id")
    return from_hf(read_json(resolve(config.model.path) / "config.json"))


def heads_shape(config: Config, model: ModelConfig) -> HeadsConfig:
    """The shape of the heads to train."""
    if config.mode == "pretrain":
        return NO_HEADS
    ours = config.heads
    vocab = model.vocab_size if ours.truncated or not ours.shared else 0
    if ours.truncated >= model.vocab_size:
        raise InputError(
            f"heads.truncated is {ours.truncated}; expected fewer than the model's "
            f"{model.vocab_size} tokens, or 0 for all"
        )
    return HeadsConfig(
        ours.number, ours.layers, model.hidden_size, vocab, ours.shared, ours.truncated
    )


def layout(config: Config, model: ModelConfig, heads: HeadsConfig) -> dict[str, Parameter]:
    """Every parameter of a run by path; refuses to leave one without an optimizer group."""
    backbone = scanned_backbone.shapes(_shapes(backbone_places(model)), model.num_layers)
    shapes = {f"backbone/{path}": shape for path, shape in backbone.items()}
    adapters, teacher = {}, {}
    if config.adapted:
        adapted = {path: shape for path, shape in backbone.items() if path.endswith("/weight")}
        adapted["lm_head"] = (model.vocab_size, model.hidden_size)  # also of tied models
        for path, shape in adapted.items():
            name = f"adapters/{path.removesuffix('/weight')}"
            adapters |= lora.shapes(name, shape, config.lora.rank)
    if config.loss.distill and not config.adapted:
        teacher = {path.replace("backbone/", "teacher/", 1): s for path, s in shapes.items()}
    head_shapes = _shapes(head_places(heads)) if heads.num_heads else {}
    shapes |= teacher | adapters | {f"heads/{path}": shape for path, shape in head_shapes.items()}
    found = group_of(shapes, groups(config))

    def dtype(path: str) -> str:
        if path == TOKEN_MAP:
            return "int32"
        return config.model.dtype if found[path] == FROZEN else "float32"

    return {path: Parameter(shape, dtype(path), found[path]) for path, shape in shapes.items()}


def split(leaves: Mapping[str, Any], table: Mapping[str, Parameter]) -> tuple[dict, dict]:
    """(trainable, frozen) nested parameters from leaves by path."""
    learns = {path: leaf for path, leaf in leaves.items() if table[path].group != FROZEN}
    rest = {path: leaf for path, leaf in leaves.items() if path not in learns}
    return nested(learns), nested(rest)


def load(
    config: Config,
    mesh: Mesh,
    token_map: Sequence[int] = (),
    *,
    with_learnt: bool = True,
    with_frozen: bool = True,
) -> Weights:
    """Loads or makes parameters, each device its own part.

    Args:
      token_map: the tokens that truncated heads guess among.
      with_learnt, with_frozen: whether to bring what learns, and what does not; off,
        their shapes only.

    Raises:
      InputError: the model or the heads to start from cannot be had.
    """
    model = model_shape(config)
    heads = heads_shape(config, model)
    table = layout(config, model, heads)
    wanted = {
        path for path, one in table.items() if (with_frozen if one.group == FROZEN else with_learnt)
    }

    def sharding(path: str) -> NamedSharding:
        return NamedSharding(mesh, spec(path, table[path].shape, mesh))

    def put(path: str, tensors: list[StoredTensor]) -> jax.Array:
        shape = table[path].shape
        cast = [tensor.cast(table[path].dtype) for tensor in tensors]
        source = cast[0] if cast[0].shape == shape else StoredTensor.stack(cast)
        parts: dict[str, np.ndarray] = {}  # devices with the same part share what was read

        def part(index: Any) -> np.ndarray:
            key = str(index)
            if key not in parts:
                parts[key] = source.read(index)
            return parts[key]

        return jax.make_array_from_callback(shape, sharding(path), part)

    def made(path: str) -> jax.Array:
        one = table[path]
        make = jax.jit(_random, static_argnums=(1, 2, 3), out_shardings=sharding(path))
        return make(jax.random.key(config.seed), path, one.shape, one.dtype)

    def copied(path: str, source: jax.Array, rows: Any = ...) -> jax.Array:
        kind = table[path].dtype
        copy = jax.jit(lambda x: jnp.copy(x[rows].astype(kind)), out_shardings=sharding(path))
        return copy(source)

    leaves: dict[str, Any] = {}
    ids = np.array(token_map, np.int32)
    if heads.truncated:
        place = sharding(TOKEN_MAP)
        leaves[TOKEN_MAP] = jax.make_array_from_callback(ids.shape, place, ids.__getitem__)
    if config.heads.path and with_learnt and heads.num_heads:  # before what takes long
        stored = head_tensors(_starting_heads(config.heads.path), heads)
        paths = {f"heads/{name}": tensor for name, tensor in stored.items()}
        for path in paths.keys() & table.keys() - {TOKEN_MAP}:
            leaves[path] = put(path, [paths[path]])
    if any(path.startswith(("backbone/", "teacher/")) for path in wanted):
        if config.model.random:
            leaves |= {path: made(path) for path in table if path.startswith("backbone/")}
        else:
            stored = backbone_tensors(config.model.path)
            for path in (path for path in table if path.startswith("backbone/")):
                names = scanned_backbone.members(path.removeprefix("backbone/"), model.num_layers)
                leaves[path] = put(path, [stored[name] for name in names])
    unembedding = "backbone/embed/embedding" if model.tied else "backbone/lm_head"
    for path in sorted(wanted - leaves.keys()):
        if path.startswith("teacher/"):
            leaves[path] = copied(path, leaves[path.replace("teacher/", "backbone/", 1)])
        elif path.startswith("heads/") and path.endswith("/vocab"):
            # A new head starts as the lm_head.
            leaves[path] = copied(path, leaves[unembedding], ids if heads.truncated else ...)
        else:
            leaves[path] = made(path)
    for path in table.keys() - wanted - {TOKEN_MAP}:
        one = table[path]
        leaves[path] = jax.ShapeDtypeStruct(
            one.shape, jnp.dtype(one.dtype), sharding=sharding(path)
        )
    trainable, frozen = split(leaves, table)
    return Weights(model, heads, trainable, frozen)


def _random(key: jax.Array, path: str, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """A new parameter."""
    if path.startswith("adapters/"):
        return lora.init(path, shape, key).astype(dtype)
    if path.endswith("/scale"):
        return jnp.ones(shape, dtype)
    if path.startswith("heads/") or path.endswith("/bias"):
        return jnp.zeros(shape, dtype)
    return (0.02 * jax.random.normal(lora.path_key(key, path), shape)).astype(dtype)


def _shapes(places: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {"/".join(place.path): place.shape for place in places.values()}


def starting_token_map(config: Config) -> list[int]:
    """The tokens that the heads to start from guess among; none where they are not truncated."""
    heads = heads_shape(config, model_shape(config))
    stored = head_tensors(_starting_heads(config.heads.path), heads)
    return stored["token_map"].read().tolist() if "token_map" in stored else []


def _starting_heads(path: str) -> Path:
    """Heads of a directory or file, or those an earlier run exported."""
    if (Path(path) / "metrics.jsonl").is_file():
        for exported in (Path(path) / "heads", Path(path) / "model"):
            if exported.is_dir():
                return exported
        raise InputError(f"heads.path {path}: that run has exported nothing (yet)")
    try:
        return resolve(path)
    except InputError as error:
        raise InputError(
            f"heads.path: {error}; train them first, or start from copies of the lm_head with "
            "--config.heads.path="
        ) from None
