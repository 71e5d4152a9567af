"""Which parameter learns at which rate: one table from paths to groups, one optimizer a group."""

import functools
import math
import re
from collections.abc import Iterable

import jax.numpy as jnp
import optax
from optax import contrib

from medusa_jax.errors import InputError
from medusa_jax.param_paths import map_with_path
from medusa_jax.training.settings import Config, Loss, Optim

FROZEN = "frozen"
_PLAIN = re.compile("(scale|bias)$")  # which weight decay leaves alone
_RMS = 0.2  # of Muon's updates, as AdamW's have: one rate does for both (arXiv 2502.16982, 2.2)


def groups(config: Config) -> dict[str, str]:
    """Regular expression of each group's parameters, which must match whole paths."""
    learns = config.mode == "pretrain" or (config.mode == "medusa2" and not config.adapted)
    trained = config.optim.trained if learns else "(?!)"  # which matches nothing
    return {
        "heads": "heads/(?!token_map$).*",
        "adapters": "adapters/.*",
        "backbone": f"backbone/(?:{trained})",
        FROZEN: f"(?:backbone/(?!(?:{trained})$)|teacher/).*|heads/token_map",
    }


def group_of(paths: Iterable[str], table: dict[str, str]) -> dict[str, str]:
    """The group of every parameter.

    Raises:
      InputError: one falls in no group, or in several; all such are named.
    """
    found, wrong = {}, []
    for path in paths:
        names = [name for name, pattern in table.items() if re.fullmatch(pattern, path)]
        if len(names) == 1:
            found[path] = names[0]
        else:
            wrong.append(f"{path} is in {' and '.join(names) or 'none'}")
    if wrong:
        raise InputError(
            "every parameter must be in exactly one optimizer group:\n  " + "\n  ".join(wrong)
        )
    return found


def learning_rate(optim: Optim, total_steps: int) -> optax.Schedule:
    """Rate of multiplier 1 over steps: linear warm-up, then cosine to zero or constant."""
    warmup = min(optim.warmup_steps, total_steps - 1)
    if optim.schedule == "constant":
        rest = optax.constant_schedule(optim.learning_rate)
    else:
        rest = optax.cosine_decay_schedule(optim.learning_rate, max(total_steps - warmup, 1))
    if not warmup:
        return rest
    # The first step already learns: a rate of zero would waste its batch.
    rise = optax.linear_schedule(optim.learning_rate / warmup, optim.learning_rate, warmup - 1)
    return optax.join_schedules([rise, rest], [warmup])


def heads_weight(loss: Loss, total_steps: int) -> optax.Schedule:
    """lambda_0 over the steps of a run: constant, or rising from 0 linearly or by a sine."""
    if loss.ramp == "constant":
        return optax.constant_schedule(loss.heads_weight)
    steps = max(int(loss.ramp_fraction * total_steps), 1)
    rise = optax.linear_schedule(0.0, 1.0, steps)
    if loss.ramp == "linear":
        return lambda step: loss.heads_weight * rise(step)
    return lambda step: loss.heads_weight * jnp.sin(math.pi / 2 * rise(step))


def optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    """Clipping, then each group at its multiple of the rate; frozen parameters stay.

    AdamW for all, or, for the matrices of the backbone's layers, Muon.
    """
    optim = config.optim
    rate = learning_rate(optim, total_steps)

    def adamw(multiplier: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda step: multiplier * rate(step),
            b1=optim.beta1,
            b2=optim.beta2,
            weight_decay=optim.weight_decay,
            mask=functools.partial(map_with_path, lambda path, _: not _PLAIN.search(path)),
        )

    def muon() -> optax.GradientTransformation:
        return contrib.muon(
            rate,
            weight_decay=optim.weight_decay,
            weight_decay_mask=functools.partial(
                map_with_path, lambda path, _: not _PLAIN.search(path)
            ),
            adam_b1=optim.beta1,
            adam_b2=optim.beta2,
            muon_weight_dimension_numbers=functools.partial(map_with_path, _matrix),
            consistent_rms=_RMS,
        )

    table = groups(config)

    def labels(params: dict) -> dict:
        return map_with_path(lambda path, _: group_of([path], table)[path], params)

    per_group = optax.multi_transform(
        {
            "heads": adamw(optim.heads_multiplier),
            "adapters": adamw(1.0),
            "backbone": muon() if optim.kind == "muon" else adamw(1.0),
            FROZEN: optax.set_to_zero(),
        },
        labels,
    )
    if not optim.clip:
        return per_group
    return optax.chain(optax.clip_by_global_norm(optim.clip), per_group)


def _matrix(path: str, _: object) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter are a matrix for Muon: of the stacked layers' [L, out, in]."""
    if re.fullmatch("backbone/layers/.*/weight", path):
        return contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    return None
