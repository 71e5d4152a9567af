"""The parameters of a run: `plan` lists them, and `load` puts them on their devices."""

import dataclasses
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from medusa_jax.checkpoints.backbone import open_backbone, read_settings, settings_file
from medusa_jax.checkpoints.heads import head_tensors
from medusa_jax.checkpoints.hub import resolve
from medusa_jax.checkpoints.load import backbone_tensors
from medusa_jax.checkpoints.names import Place, backbone_places, head_places
from medusa_jax.checkpoints.stored_tensor import StoredTensor, Tensors
from medusa_jax.distributed.rules import put, spec
from medusa_jax.drafting.medusa_heads import HYDRA, NO_HEADS, HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.model import layer_stack
from medusa_jax.model.config import ModelConfig, from_hf
from medusa_jax.model.presets import PRESETS
from medusa_jax.param_paths import nested
from medusa_jax.training import lora, scanned_backbone
from medusa_jax.training.optimizer import FROZEN, group_of, groups
from medusa_jax.training.settings import Config

TOKEN_MAP = "heads/token_map"
Shapes = dict[str, tuple[int, ...]]
# Sources of a parameter's first values: files, an initializer, or the caller (the token map).
FILES, INITIAL, GIVEN = "files", "initializer", "given"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a run.

    Attributes:
      shape: its dimensions.
      dtype: float32 where it learns, else the computation's.
      group: of the optimizer.
      source: `FILES`, `INITIAL` or `GIVEN`, or the path of the parameter that it copies.
    """

    shape: tuple[int, ...]
    dtype: str
    group: str
    source: str


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
    directory = resolve(path)
    if config.model.random or absent:  # its weights need not be there
        return from_hf(read_settings(directory), str(settings_file(directory)))
    return open_backbone(directory).config


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
        num_heads=ours.number,
        num_layers=ours.layers,
        hidden_size=model.hidden_size,
        vocab_size=vocab,
        shared=ours.shared,
        truncated=ours.truncated,
        selector=ours.selector,
        architecture=ours.architecture,
    )


def plan(config: Config, model: ModelConfig, heads: HeadsConfig) -> dict[str, Parameter]:
    """Every parameter of a run by path.

    Raises:
      InputError: a parameter is in no group of the optimizer, or in several.
    """
    stacks = scanned_backbone.shapes(_shapes(backbone_places(model)), model.num_layers)
    if config.data.hidden_states:  # then only the projection is left to compute
        needed = {"embed/embedding" if model.tied else "lm_head"}
        needed |= {"embed/embedding"} if heads.selector or heads.architecture == HYDRA else set()
        stacks = {path: shape for path, shape in stacks.items() if path in needed}
    backbone = {f"backbone/{path}": shape for path, shape in stacks.items()}
    shapes = backbone | _teacher_shapes(config, backbone) | _adapter_shapes(config, model, stacks)
    shapes |= {f"heads/{path}": shape for path, shape in _shapes(head_places(heads)).items()}
    group = group_of(shapes, groups(config))

    def parameter(path: str) -> Parameter:
        dtype = config.model.dtype if group[path] == FROZEN else "float32"
        if path == TOKEN_MAP:
            dtype = "int32"
        return Parameter(shapes[path], dtype, group[path], _source(config, model, path))

    return {path: parameter(path) for path in shapes}


def _teacher_shapes(config: Config, backbone: Shapes) -> Shapes:
    """With adapters, the teacher is the backbone without them; else it is a frozen copy."""
    if not config.loss.distill or config.adapted:
        return {}
    return {path.replace("backbone/", "teacher/", 1): shape for path, shape in backbone.items()}


def _adapter_shapes(config: Config, model: ModelConfig, stacks: Shapes) -> Shapes:
    """Adapters of every projection and of the lm_head, of tied models too."""
    if not config.adapted:
        return {}
    weights = {path: shape for path, shape in stacks.items() if path.endswith("/weight")}
    weights["lm_head"] = (model.vocab_size, model.hidden_size)
    adapters: Shapes = {}
    for path, shape in weights.items():
        name = f"adapters/{path.removesuffix('/weight')}"
        adapters |= lora.shapes(name, shape, config.lora.rank)
    return adapters


def _source(config: Config, model: ModelConfig, path: str) -> str:
    """`Parameter.source` of a path."""
    part = path.split("/")[0]
    if path == TOKEN_MAP:
        return GIVEN
    if part == "teacher":
        return path.replace("teacher/", "backbone/", 1)
    if part == "backbone":
        return INITIAL if config.model.random else FILES
    if part == "heads" and config.heads.path:
        return FILES
    if part == "heads" and path.endswith("/vocab"):  # a new head starts as the lm_head
        return "backbone/embed/embedding" if model.tied else "backbone/lm_head"
    return INITIAL


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
      with_learnt, with_frozen: whether to load what learns, and what does not; if not,
        leaves are shapes only.

    Raises:
      InputError: the model or the heads to start from cannot be had.
    """
    model = model_shape(config)
    heads = heads_shape(config, model)
    table = plan(config, model, heads)
    wanted = {
        path
        for path, parameter in table.items()
        if parameter.source == GIVEN or (with_frozen if parameter.group == FROZEN else with_learnt)
    }
    needed = wanted | ({table[path].source for path in wanted} & table.keys())
    stored = _open_files(config, table, needed, model, heads)
    ids = np.array(token_map, np.int32)
    places = {path: NamedSharding(mesh, spec(path, p.shape, mesh)) for path, p in table.items()}
    arrays: dict[str, jax.Array] = {}
    for path in (path for path in table if path in needed):  # copies come after their source
        shape, dtype, source = table[path].shape, table[path].dtype, table[path].source
        if source == FILES and path not in stored:  # a selector for heads that have none
            source = INITIAL
        if source == FILES:
            arrays[path] = put(stored[path].cast(dtype).read, shape, places[path])
        elif source == GIVEN:
            arrays[path] = put(ids.__getitem__, shape, places[path])
        elif source == INITIAL:
            make = jax.jit(_initial, static_argnums=(1, 2, 3), out_shardings=places[path])
            arrays[path] = make(jax.random.key(config.seed), path, shape, dtype)
        else:
            rows = ids if heads.truncated and path.startswith("heads/") else None
            copy = jax.jit(_copy, static_argnums=2, out_shardings=places[path])
            arrays[path] = copy(arrays[source], rows, dtype)
    leaves = {
        path: arrays[path]
        if path in wanted
        else jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype), sharding=places[path])
        for path, p in table.items()
    }
    trainable, frozen = split(leaves, table)
    return Weights(model, heads, trainable, frozen)


def _open_files(
    config: Config,
    table: Mapping[str, Parameter],
    needed: Set[str],
    model: ModelConfig,
    heads: HeadsConfig,
) -> Tensors:
    """The needed parameters that come from files, unread, by path; layers are stacked."""
    paths = [path for path in table if path in needed and table[path].source == FILES]
    tensors: Tensors = {}
    if any(path.startswith("heads/") for path in paths):
        stored = _starting_tensors(config, heads)
        tensors = {f"heads/{name}": tensor for name, tensor in stored.items()}
    if any(path.startswith("backbone/") for path in paths):
        stored = backbone_tensors(config.model.path)
        for path in paths:
            if path.startswith("backbone/layers/"):
                names = layer_stack.members(path.removeprefix("backbone/"), model.num_layers)
                tensors[path] = StoredTensor.stack([stored[name] for name in names])
            elif path.startswith("backbone/"):
                tensors[path] = stored[path.removeprefix("backbone/")]
    return tensors


def _initial(key: jax.Array, path: str, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """A new parameter."""
    if path.startswith("adapters/"):
        return lora.init(path, shape, key).astype(dtype)
    if path.endswith("/scale"):
        return jnp.ones(shape, dtype)
    if re.search("selector/(before|after)/", path):  # of inputs with a root mean square of 1
        return (jax.random.normal(lora.path_key(key, path), shape) / shape[1] ** 0.5).astype(dtype)
    if path.endswith("/residual/weight"):  # a new Hydra head passes the hidden state on
        return jnp.eye(*shape, dtype=dtype)
    if path.startswith("heads/") or path.endswith("/bias"):
        return jnp.zeros(shape, dtype)
    return (0.02 * jax.random.normal(lora.path_key(key, path), shape)).astype(dtype)


def _copy(source: jax.Array, rows: jax.Array | None, dtype: str) -> jax.Array:
    """The rows of a parameter, or, with None, a copy of all of it."""
    return jnp.copy((source if rows is None else source[rows]).astype(dtype))


def _shapes(places: Mapping[str, Place]) -> Shapes:
    return {"/".join(place.path): place.shape for place in places.values()}


def starting_token_map(config: Config) -> list[int]:
    """The tokens that the heads to start from guess among; none where they are not truncated."""
    heads = heads_shape(config, model_shape(config))
    stored = _starting_tensors(config, heads)
    return stored["token_map"].read().tolist() if "token_map" in stored else []


def check_heads(config: Config, *, start: bool) -> None:
    """Raises InputError unless the model can have such heads, and those to `start` from fit."""
    heads = heads_shape(config, model_shape(config))
    if start and heads.num_heads and config.heads.path:
        _starting_tensors(config, heads)


def _starting_tensors(config: Config, heads: HeadsConfig) -> Tensors:
    """The tensors of the heads to start from, unread."""
    return head_tensors(_starting_heads(config.heads.path), heads)


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
