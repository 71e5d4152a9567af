"""What a training run is: mutable dataclasses that `configs/NAME.py` fill in.

Every field can be overridden on the command line: `--config.optim.learning_rate=1e-3`.
"""

import dataclasses
from typing import Any

from flax import traverse_util

from medusa_jax import options
from medusa_jax.drafting.medusa_heads import ARCHITECTURES, HYDRA, MEDUSA
from medusa_jax.errors import InputError
from medusa_jax.json_files import Fields
from medusa_jax.options import option
from medusa_jax.training.remat import INPUT, PRODUCTS, Remat


@dataclasses.dataclass
class Backbone:
    """The model whose hidden states the heads read.

    Attributes:
      path: Hugging Face directory or hub id, a GGUF file, or smollm2.
      shape: a name of `medusa_jax.presets`, for `--compile_only` and random weights.
      random: start from random weights; `path`, if given, names the shape and tokenizer only.
      dtype: of the computation and of frozen weights; what learns is kept in float32.
      remat: keep one activation a layer and recompute the rest in the backward pass.
      kept, offloaded: arrays of a layer that are kept too, on the device or in its host's memory
        (`remat.py`).
    """

    path: str = ""
    shape: str = ""
    random: bool = False
    dtype: str = option("bfloat16", choices=("float32", "bfloat16"))
    remat: bool = True
    kept: tuple[str, ...] = option((), choices=PRODUCTS)
    offloaded: tuple[str, ...] = option((), choices=(INPUT, *PRODUCTS))

    @property
    def recomputed(self) -> Remat | None:
        """What the backward pass of a layer recomputes."""
        return Remat(tuple(self.kept), tuple(self.offloaded)) if self.remat else None


@dataclasses.dataclass
class Heads:
    """The heads to train.

    Attributes:
      architecture: `medusa`; or `hydra`, heads that also see the tokens drafted before.
      number, layers: M heads of this many residual blocks.
      shared: predict through the backbone's lm_head instead of a projection each.
      truncated: guess among this many tokens only, those most frequent in the training
        data: a shorter projection to read in every step; 0 for all.
      selector: ranks of the learned selector, which trees grown at each step read; 0 for none.
        The heads get no gradient from it.
      path: heads to start from: a directory or file of heads, or the working
        directory of an earlier run. Empty: copies of the lm_head.
    """

    architecture: str = option(MEDUSA, choices=ARCHITECTURES)
    number: int = option(5, least=0)
    layers: int = option(1, least=0)
    shared: bool = False
    truncated: int = option(0, least=0)
    selector: int = option(0, least=0)
    path: str = ""


@dataclasses.dataclass
class Lora:
    """Low-rank adapters of all backbone projections and the lm_head (Medusa-2).

    Attributes:
      rank: 0 trains the whole backbone instead.
      alpha: an adapter's output is scaled by alpha / rank.
      dropout: of an adapter's input, drawn anew for each piece and layer.
    """

    rank: int = option(32, least=0)
    alpha: float = 16.0
    dropout: float = 0.05


@dataclasses.dataclass
class Data:
    """What is read, and how it becomes rows.

    Attributes:
      train: files (.json, .jsonl and .txt, also .gz, and .parquet) or hub datasets
        (`owner/name`, `owner/name:split`).
      eval: held-out files; empty takes `eval_fraction` of the training documents.
      eval_fraction: share held out where `eval` is empty.
      eval_rows: most rows of one evaluation, 0 for all.
      template: chat template: `vicuna`, `zephyr` or a Jinja file; empty: the tokenizer's own.
      separator: what divides the documents of a text file.
      end: token after a document of plain text: a token's text, or empty for none.
      sequence_length: T, tokens in a row.
      packing: several documents in a row; off: one each, padded.
      max_documents: read no more than this many of each source, 0 for all.
      on_bad: `skip` (and count) or `refuse` what is no conversation.
      hidden_states: directory that keeps the backbone's hidden states in bfloat16 (Medusa-1).
        The first run computes them, 2 D bytes a token; epochs and runs after it read them.
        Empty: each step computes its own.
    """

    train: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    eval_fraction: float = 0.01
    eval_rows: int = option(256, least=0)
    template: str = ""
    separator: str = "<|endoftext|>"
    end: str = ""
    sequence_length: int = option(2048, least=2)
    packing: bool = True
    max_documents: int = 0
    on_bad: str = option("skip", choices=("skip", "refuse"))
    hidden_states: str = ""


@dataclasses.dataclass
class Loss:
    """The loss (paper, sections 2.2 and 2.3).

    Attributes:
      decay: head k (1-based) weighs decay^k.
      heads_weight: lambda_0, the weight of the heads' loss beside the backbone's (Medusa-2).
      ramp: how lambda_0 grows to that: `constant`, `linear` or `sine` (a quarter wave).
      ramp_fraction: share of the run after which it is reached.
      distill: KL to the backbone as it was in place of its own cross-entropy.
      heads: what a head learns: `ce`, cross-entropy with the text; `d_pace`, the same with
        weights by what it adds to the accepted length; and losses to the backbone's distribution
        (`head_losses.py`): `teacher`, cross-entropy; `tv`, total variation; `lk_hybrid`, KL and
        then total variation.
      smoothing: s of `d_pace`.
      eta: of `lk_hybrid`.
      chunk: positions of a device's rows whose logits exist at a time, 0 for all.
    """

    decay: float = option(0.8, least=0)
    heads_weight: float = 0.2
    ramp: str = option("constant", choices=("constant", "linear", "sine"))
    ramp_fraction: float = 1.0
    distill: bool = False
    heads: str = option("ce", choices=("ce", "teacher", "d_pace", "tv", "lk_hybrid"))
    smoothing: float = option(0.5, least=0, most=1)
    eta: float = option(3.0, least=0)
    chunk: int = option(512, least=0)


@dataclasses.dataclass
class Optim:
    """The optimizer, with warm-up.

    Attributes:
      kind: `adamw`, or `muon` for the matrices of a backbone that learns (AdamW for the rest).
      learning_rate: peak, of backbone and adapters.
      heads_multiplier: the heads, biases included, learn at this many times that rate.
      trained: regular expression of the backbone parameters ("layers/mlp/up/weight",
        "lm_head") that learn when all of it could (Medusa-2 without LoRA,
        pretraining); the rest is frozen.
      batch_size: rows of one step, over all devices.
      accumulation: a step's rows pass through in this many pieces.
      epochs, steps: length of the run; `steps`, if not 0, wins.
      warmup_steps: linear rise.
      schedule: `cosine` to zero, or `constant`.
      weight_decay: of matrices; 0 in the paper's recipes.
      beta1, beta2: of Adam's moments.
      clip: largest norm of the gradient, 0 for none.
    """

    kind: str = option("adamw", choices=("adamw", "muon"))
    learning_rate: float = option(5e-4, least=0)
    heads_multiplier: float = 4.0
    trained: str = ".*"
    batch_size: int = option(64, least=1)
    accumulation: int = option(1, least=1)
    epochs: float = 2.0
    steps: int = option(0, least=0)
    warmup_steps: int = option(40, least=0)
    schedule: str = option("cosine", choices=("cosine", "constant"))
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = option(1.0, least=0)

    @property
    def piece_rows(self) -> int:
        """Rows that pass through at once."""
        return self.batch_size // self.accumulation


@dataclasses.dataclass
class Mesh:
    """Devices by use; -1, once, stands for all that are left.
    Attributes:
      data: copies of the model, each with its own rows.
      fsdp: parts of the weights, each with its own rows.
      tensor: parts of every matrix product, for the same rows.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass
class Run:
    """What a run writes, and how often, in steps. May differ when it is resumed.

    Attributes:
      log_every, eval_every, save_every: 0 only at the end (and, of the first two, at the start).
      keep: newest checkpoints kept; the best evaluated one stays beside them.
      patience: steps in a row that the loss may be above three times its first held-out value
        (or that of a uniform guess, if larger) before the run stops; 0 never stops it.
      tensorboard: write TensorBoard events.
      export_dtype: of the exported weights; empty: the backbone's dtype.
    """

    log_every: int = option(10, least=0)
    eval_every: int = option(200, least=0)
    save_every: int = option(200, least=0)
    keep: int = option(3, least=1)
    patience: int = option(50, least=0)
    tensorboard: bool = True
    export_dtype: str = option("", choices=("", "float32", "bfloat16", "float16"))


@dataclasses.dataclass
class Config:
    """A run. `mode`: medusa1 (heads alone), medusa2 (with the backbone), pretrain (no heads)."""

    mode: str = option("medusa1", choices=("medusa1", "medusa2", "pretrain"))
    seed: int = option(0, least=0, most=2**32 - 1)
    model: Backbone = dataclasses.field(default_factory=Backbone)
    heads: Heads = dataclasses.field(default_factory=Heads)
    lora: Lora = dataclasses.field(default_factory=Lora)
    data: Data = dataclasses.field(default_factory=Data)
    loss: Loss = dataclasses.field(default_factory=Loss)
    optim: Optim = dataclasses.field(default_factory=Optim)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    run: Run = dataclasses.field(default_factory=Run)

    @property
    def adapted(self) -> bool:
        """Whether the backbone learns through adapters."""
        return self.mode == "medusa2" and self.lora.rank > 0


def check(config: Config) -> None:
    """Refuses settings that contradict themselves.

    Raises:
      InputError: names the field, what it is and what it may be.
    """
    options.check(config, "")
    for section in dataclasses.fields(config):
        if dataclasses.is_dataclass(part := getattr(config, section.name)):
            options.check(part, f"{section.name}.")
    for name, value in (
        ("lora.dropout", config.lora.dropout),
        ("data.eval_fraction", config.data.eval_fraction),
        ("optim.beta1", config.optim.beta1),
        ("optim.beta2", config.optim.beta2),
    ):
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}; expected 0 or more, and less than 1")
    if not config.optim.steps and config.optim.epochs <= 0:
        raise InputError(f"optim.epochs is {config.optim.epochs}; expected more than 0")
    if twice := set(config.model.kept) & set(config.model.offloaded):
        raise InputError(
            f"model.kept and model.offloaded both name {', '.join(sorted(twice))}; "
            "expected each array in one memory"
        )
    if config.mode != "pretrain" and not config.heads.number:
        raise InputError("heads.number must be at least 1, got 0")
    if config.heads.shared and not config.heads.layers:
        raise InputError("heads.layers is 0 with heads.shared: such heads would hold nothing")
    if config.heads.architecture == HYDRA:
        _check_hydra(config.heads)
    if config.optim.batch_size % config.optim.accumulation:
        raise InputError(
            f"optim.batch_size {config.optim.batch_size} does not divide into "
            f"optim.accumulation = {config.optim.accumulation} pieces"
        )
    if config.loss.distill and config.mode != "medusa2":
        raise InputError(
            f"loss.distill needs mode 'medusa2' (a backbone that learns), got {config.mode!r}"
        )
    if config.data.hidden_states and config.mode != "medusa1":
        raise InputError(
            "data.hidden_states keeps those of a backbone that does not learn (mode 'medusa1'), "
            f"got mode {config.mode!r}"
        )
    if config.optim.trained != ".*" and (config.mode == "medusa1" or config.adapted):
        raise InputError(
            "optim.trained chooses among backbone parameters, none of which learn "
            f"in mode {config.mode!r}" + (" with LoRA" if config.adapted else "")
        )


def _check_hydra(heads: Heads) -> None:
    """Raises InputError for what Hydra heads cannot have."""
    if not heads.layers:
        raise InputError("heads.layers is 0; Hydra heads read their input by a block: 1 or more")
    if heads.selector:
        raise InputError(
            f"heads.selector is {heads.selector}; Hydra heads see the token before: expected 0"
        )


def from_dict(values: dict[str, Any], origin: str = "the settings") -> Config:
    """The configuration that `dataclasses.asdict` turned into `values` (a run's config.json).

    Raises:
      InputError: a field that does not exist, or a value of another type; begins with `origin`.
    """
    return _filled(Config(), Fields(values, origin))


def _filled(made: Any, fields: Fields) -> Any:
    """A dataclass whose fields take the values of a JSON object."""
    for name in fields.content:
        old = getattr(made, name, None)
        if dataclasses.is_dataclass(old):
            _filled(old, fields.inner(name))
        elif isinstance(old, bool):
            setattr(made, name, fields.flag(name))
        elif isinstance(old, int):
            setattr(made, name, fields.integer(name, least=-(2**53), most=2**53))
        elif isinstance(old, float):
            setattr(made, name, fields.number(name))
        elif isinstance(old, str):
            setattr(made, name, fields.text(name))
        elif isinstance(old, tuple):
            setattr(made, name, fields.texts(name))
        else:
            raise InputError(f"{fields.origin}: unknown setting {name!r}")
    return made


def by_name(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as a flat dict: {"optim": {"clip": 1.0}} -> {"optim.clip": 1.0}."""
    return traverse_util.flatten_dict(values, sep=".")
