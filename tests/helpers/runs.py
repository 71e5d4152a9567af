"""Whole training runs of a tiny random model, in this process or in their own."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.paths import ROOT
from medusa_jax.checkpoints.names import backbone_places
from medusa_jax.model.config import from_hf

WORDS = ["<s>", "</s>", *(f"w{i}" for i in range(40))]
CONFIG = """
from medusa_jax.training.settings import *

def get_config():
    return Config(
        mode="medusa1",
        model=Backbone(path={model!r}, dtype="float32"),
        heads=Heads(number=2),
        lora=Lora(rank=2, dropout=0.1),
        data=Data(train=({data!r},), end="</s>", sequence_length=16, eval_fraction=0.1,
                  eval_rows=8),
        loss=Loss(chunk=8),
        optim=Optim(batch_size=4, steps=24, warmup_steps=2, learning_rate=3e-3),
        mesh=Mesh(fsdp=1),
        run=Run(log_every=1, eval_every=8, save_every=4, tensorboard=False),
    )
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of words, some text to learn, and a config file."""
    directory = tmp_path_factory.mktemp("trainer")
    model = directory / "model"
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(model)
    config = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "head_dim": 4,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": len(WORDS), "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "eos_token_id": 1, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    places = backbone_places(from_hf(config)).items()
    tensors = {name: rng.normal(0, 0.2, one.shape).astype(np.float32) for name, one in places}
    tensors |= {name: 1 + 0 * t for name, t in tensors.items() if t.ndim == 1}
    save_file(tensors, model / "model.safetensors")
    # Text with a pattern, so that there is something to learn: every word is followed by the next.
    starts = rng.integers(0, 40, 200)
    stories = [" ".join(f"w{(s + i) % 40}" for i in range(rng.integers(8, 40))) for s in starts]
    (directory / "stories.txt").write_text("<|endoftext|>".join(stories))
    text = CONFIG.format(model=str(model), data=str(directory / "stories.txt"))
    (directory / "config.py").write_text(text)
    return directory


def train(place: Path, workdir: Path | str, *flags: str) -> tuple[int, str]:
    """Runs train.py in this process: (exit code, stderr)."""
    old, err = sys.argv, io.StringIO()
    sys.argv = ["train.py", "--config", str(place / "config.py"), "--workdir", str(workdir), *flags]
    try:
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        sys.argv = old
    assert "Traceback" not in err.getvalue()
    return int(done.value.code or 0), err.getvalue()


def lines(workdir: Path) -> list[dict[str, Any]]:
    """Logged metrics, but for the speed, which no two runs share."""
    every = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in every]


@pytest.fixture(scope="session")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run that was never stopped."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    code, err = train(place, workdir)
    assert code == 0, err
    return workdir


def launch(
    place: Path, workdir: Path, *flags: str, before: Sequence[str] = (), **env: str
) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--config", place / "config.py", "--workdir", workdir]
    return subprocess.Popen(
        [*before, *command, *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
    )


def wait_for_checkpoint(workdir: Path, step: int, process: subprocess.Popen) -> None:
    """Returns once a checkpoint of that step or a later one is complete."""
    deadline = time.monotonic() + 200
    while not any(int(d.name) >= step for d in workdir.glob("checkpoints/*") if d.name.isdigit()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.002)
