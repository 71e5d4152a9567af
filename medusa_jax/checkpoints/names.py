"""Names of tensors in checkpoint files, and the parameter that each one holds.

One table serves both ways, reading and writing: shapes are the same on both
sides, so a tensor is only ever renamed.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from medusa_jax.checkpoints.stored_tensor import Tensors
from medusa_jax.drafting.hydra_heads import RESIDUAL
from medusa_jax.drafting.medusa_heads import HYDRA, HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig

MOST_LINES = 30  # of a message about tensors


@dataclasses.dataclass(frozen=True)
class Place:
    """The parameter that a stored tensor holds.

    Attributes:
      path: keys in the nested parameter dict.
      shape: the same there and here.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]


def backbone_places(config: ModelConfig) -> dict[str, Place]:
    """Hugging Face's names of a Llama-family backbone's tensors."""
    width, ffn = config.hidden_size, config.ffn_size
    query_width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    places = {
        "model.embed_tokens.weight": Place(("embed", "embedding"), (config.vocab_size, width)),
        "model.norm.weight": Place(("final_norm", "scale"), (width,)),
    }
    if not config.tied:
        places["lm_head.weight"] = Place(("lm_head",), (config.vocab_size, width))
    linears = {
        "self_attn.q_proj": ("attention", "query", query_width, width, config.qkv_bias),
        "self_attn.k_proj": ("attention", "key", kv_width, width, config.qkv_bias),
        "self_attn.v_proj": ("attention", "value", kv_width, width, config.qkv_bias),
        "self_attn.o_proj": ("attention", "out", width, query_width, config.out_bias),
        "mlp.gate_proj": ("mlp", "gate", ffn, width, config.mlp_bias),
        "mlp.up_proj": ("mlp", "up", ffn, width, config.mlp_bias),
        "mlp.down_proj": ("mlp", "down", width, ffn, config.mlp_bias),
    }
    norms: dict[str, tuple[tuple[str, ...], int]] = {
        "input_layernorm": (("attention_norm",), width),
        "post_attention_layernorm": (("mlp_norm",), width),
    }
    if config.qk_norm:
        norms["self_attn.q_norm"] = (("attention", "query_norm"), config.head_dim)
        norms["self_attn.k_norm"] = (("attention", "key_norm"), config.head_dim)
    for i in range(config.num_layers):
        stored, layer = f"model.layers.{i}", f"layer_{i}"
        for name, (group, ours, out, into, bias) in linears.items():
            path = (layer, group, ours)
            places[f"{stored}.{name}.weight"] = Place((*path, "weight"), (out, into))
            if bias:
                places[f"{stored}.{name}.bias"] = Place((*path, "bias"), (out,))
        for name, (path, size) in norms.items():
            places[f"{stored}.{name}.weight"] = Place((layer, *path, "scale"), (size,))
    return places


@dataclasses.dataclass(frozen=True)
class HeadNames:
    """How files name head tensors; {h} is the head, {l} the layer, {L} the number of layers.

    Attributes:
      linear: a residual block's, without ".weight" and ".bias".
      vocab: a head's own projection.
      shared: a stored projection that all heads share; "" where the dialect has none.
      token_map: ids of the rows of truncated projections; "" where the dialect has none.
      selector: what begins the names of the learned selector; "" where the dialect has none.
      residual: of Hydra heads, the R of their first block, without ".weight" and ".bias"; their
        own projections have biases.
    """

    linear: str
    vocab: str
    shared: str = ""
    token_map: str = ""
    selector: str = ""
    residual: str = ""

    @property
    def vocab_bias(self) -> str:
        """The bias of a head's own projection; "" where the dialect has none."""
        return self.vocab.replace(".weight", ".bias") if self.residual else ""


# The original itself has no truncated heads and no selector; the map's name is vLLM's.
ORIGINAL = HeadNames("{h}.{l}.linear", "{h}.{L}.weight", token_map="token_map", selector="selector")
# That of Hydra heads, zankner/Hydra, has no truncated heads either.
ORIGINAL_HYDRA = HeadNames(
    "hydra_mlp.{h}.{l}.linear",
    "hydra_lm_head.{h}.weight",
    token_map="token_map",
    residual="hydra_mlp.{h}.0.res_connection",
)
SELECTOR = ("before.weight", "after.weight", "context.weight", "context.bias")


def head_places(
    config: HeadsConfig, names: HeadNames | None = None, *, with_shared: bool = False
) -> dict[str, Place]:
    """Names of head tensors: "0.0.linear.weight" in the original's files.

    Args:
      names: of a dialect for heads of this architecture; default: the original's.
      with_shared: whether a projection that all heads share is stored with them.
    """
    width, rows = config.hidden_size, config.truncated or config.vocab_size
    names = names or (ORIGINAL_HYDRA if config.architecture == HYDRA else ORIGINAL)
    places = {}
    if config.truncated:
        places[names.token_map] = Place(("token_map",), (rows,))
    for h in range(config.num_heads):
        head = f"head_{h}"
        for name, path, into in _layers(config, names, h):
            places[f"{name}.weight"] = Place((head, path, "weight"), (width, into))
            places[f"{name}.bias"] = Place((head, path, "bias"), (width,))
        if not config.shared:
            vocab = names.vocab.format(h=h, L=config.num_layers)
            places[vocab] = Place((head, "vocab"), (rows, width))
            if names.vocab_bias:
                places[names.vocab_bias.format(h=h)] = Place((head, "vocab_bias"), (rows,))
    if config.selector and names.selector:
        of_heads = config.num_heads * config.selector
        shapes = ((config.selector, width),) * 2 + ((of_heads, width), (of_heads,))
        for name, shape in zip(SELECTOR, shapes, strict=True):
            places[f"{names.selector}.{name}"] = Place(("selector", *name.split(".")), shape)
    if with_shared:
        places[names.shared] = Place(("vocab",), (rows, width))
    return places


def _layers(config: HeadsConfig, names: HeadNames, h: int) -> list[tuple[str, str, int]]:
    """The layers of head h (0-based): their name in files, our name, and the width of the input."""
    width, numbers = config.hidden_size, range(config.num_layers)
    linears = [names.linear.format(h=h, l=l) for l in numbers]  # noqa: E741
    if config.architecture != HYDRA:
        return [(name, f"block_{l}", width) for l, name in enumerate(linears)]  # noqa: E741
    inputs = [(h + 2) * width, *(width for _ in numbers[1:])]
    residual = (names.residual.format(h=h), RESIDUAL, inputs[0])
    ours = [f"linear_{l}" for l in numbers]  # noqa: E741
    return [residual, *zip(linears, ours, inputs, strict=True)]


def matched(places: Mapping[str, Place], tensors: Tensors, source: Path) -> Tensors:
    """The placed tensors by the path of their parameter: "head_0/block_0/weight".

    Raises:
      InputError: names tensors of `source` that are missing, unexpected or misshapen.
    """
    wrong = [f"missing {name} {list(p.shape)}" for name, p in places.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in places:
            wrong.append(f"unexpected {name} {list(tensor.shape)}")
        elif tensor.shape != places[name].shape:
            wrong.append(
                f"misshapen {name}: {list(tensor.shape)}, expected {list(places[name].shape)}"
            )
    if wrong:
        more = [f"and {len(wrong) - MOST_LINES:,} more"] if len(wrong) > MOST_LINES else []
        lines = "\n  ".join([*wrong[:MOST_LINES], *more])
        raise InputError(f"{source}: tensors do not fit what was expected:\n  {lines}")
    return {"/".join(place.path): tensors[name] for name, place in places.items()}
