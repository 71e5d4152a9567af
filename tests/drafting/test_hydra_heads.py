"""Hydra heads: numbers worked out by hand, and the original's layers and names in PyTorch."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.head_files import VOCAB, WIDTH, edit_config
from torch import nn

from medusa_jax.checkpoints.load import load_model
from medusa_jax.drafting.hydra_heads import HydraHead, head_input
from medusa_jax.drafting.medusa_heads import HYDRA, HeadsConfig


def test_a_head_worked_out_by_hand():
    """D = 2, the first head: z has the hidden state and the root's embedding."""
    z = head_input(jnp.array([1.0, 2]), jnp.array([[3.0, -1]]))
    assert z.tolist() == [1, 2, 3, -1]
    params = {
        # R z + c = (1 - 1, 2 + 3) + (0.5, -1) = (0.5, 4)
        "residual": {"weight": [[1, 0, 0, 1], [0, 1, 1, 0]], "bias": [0.5, -1]},
        # W z + b = (1, 3) + (-1, -1) = (0, 2); SiLU: (0, 2 / (1 + e^-2)) = (0, 1.7615942)
        "linear_0": {"weight": [[1, 0, 0, 0], [0, 0, 1, 0]], "bias": [-1, -1]},
        # of x = (0.5, 5.7615942): (0, 1); SiLU: (0, 0.7310586)
        "linear_1": {"weight": [[0, 0], [2, 0]], "bias": [0, 0]},
        # of x = (0.5, 6.4926528)
        "vocab": [[1, 0], [0, 1], [1, 1]],
        "vocab_bias": [0, 1, -2],
    }
    params = {
        name: {part: jnp.array(leaf, jnp.float32) for part, leaf in one.items()}
        if isinstance(one, dict)
        else jnp.array(one, jnp.float32)
        for name, one in params.items()
    }
    own = HeadsConfig(1, 2, 2, 3, architecture=HYDRA)
    logits = HydraHead(own).apply({"params": params}, z, lambda x: x)
    np.testing.assert_allclose(logits, [0.5, 7.4926528, 4.9926528], rtol=1e-6)
    shared = HeadsConfig(1, 2, 2, 0, shared=True, architecture=HYDRA)
    x = HydraHead(shared).apply({"params": params}, z, lambda x: x)
    np.testing.assert_allclose(x, [0.5, 6.4926528], rtol=1e-6)


class Block(nn.Module):
    """A block of zankner/Hydra, after its paper and the names of its layers."""

    def __init__(self, inputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs * WIDTH, WIDTH)
        self.res_connection = nn.Linear(inputs * WIDTH, WIDTH) if inputs > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.res_connection(x) + nn.functional.silu(self.linear(x))


class Heads(nn.Module):
    """Heads of two blocks each."""

    def __init__(self, number: int):
        super().__init__()
        mlps = [nn.Sequential(Block(i + 2), Block(1)) for i in range(number)]
        self.hydra_mlp = nn.ModuleList(mlps)
        self.hydra_lm_head = nn.ModuleList(nn.Linear(WIDTH, VOCAB) for _ in range(number))


@pytest.mark.parametrize("kernels", [True, False])
def test_the_originals_files_give_the_originals_logits(saved: Path, tmp_path: Path, kernels: bool):
    torch.manual_seed(0)
    theirs = Heads(3)
    torch.save(theirs.state_dict(), tmp_path / "hydra_lm_head.pt")
    (tmp_path / "config.json").write_text("{}")
    edit_config(tmp_path, base_model_name_or_path=str(saved), hydra_num_heads=3)
    model = load_model(tmp_path if kernels else saved, tmp_path, kernels=kernels)
    assert model.heads == HeadsConfig(3, 2, WIDTH, VOCAB, architecture=HYDRA)
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((5, WIDTH)).astype(np.float32)
    drafted = rng.standard_normal((5, 3, WIDTH)).astype(np.float32)
    for i in range(3):
        z = head_input(jnp.asarray(hidden), jnp.asarray(drafted[:, : i + 1]))
        variables: Any = {"params": model.params["heads"][f"head_{i}"]}
        ours = HydraHead(model.heads).apply(variables, z, lambda x: x)
        with torch.no_grad():
            x = torch.tensor(np.concatenate((hidden, drafted[:, : i + 1].reshape(5, -1)), 1))
            expected = theirs.hydra_lm_head[i](theirs.hydra_mlp[i](x))
        np.testing.assert_allclose(ours, expected.numpy(), rtol=2e-4, atol=2e-5)
