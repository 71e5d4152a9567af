"""benchmarks/gpu.py measures what is missing, keeps what is there, and says what failed."""

import itertools
import json
import runpy
import types

import jax
import pytest
from helpers.models import TINY
from helpers.paths import ROOT

from medusa_jax.model.presets import PRESETS

SCRIPT = ROOT / "benchmarks/gpu.py"
OPTIONS = {"shapes": ["tiny"], "train_shape": "tiny", "batch_sizes": [2], "repeats": 1}
OPTIONS |= {"prompt_tokens": 16, "new_tokens": 4, "train_rows": 2, "train_tokens": 16}


@pytest.mark.e2e
@pytest.mark.slow
def test_one_call_measures_everything_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    script = runpy.run_path(str(SCRIPT))
    names = script["measure"].__globals__
    names["SIZES"] = (1, 8)
    ticks = itertools.count()
    names["time"] = types.SimpleNamespace(perf_counter=lambda: next(ticks) / 2)
    measure, tries, done = names["time_training"], [], []

    def short_of_memory(options, mode):
        """Medusa-1 fails at first; then Medusa-2's figures do for it."""
        tries.append(mode)
        if len(tries) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
        if not done:
            done.append(measure(options, mode))
        return done[0]

    names["time_training"] = short_of_memory
    file = tmp_path / "gpu.json"
    options = script["Options"](output=str(file), dtype="float32", **OPTIONS)
    script["measure"](options)
    first = json.loads(file.read_text())
    out = capsys.readouterr().out
    assert "train medusa1 tiny: RESOURCE_EXHAUSTED: out of memory" in out
    for part in ("medusa2 tiny", "prefill tiny", "### steps tiny"):
        assert part in out
    script["measure"](options)  # tries again what failed, and that alone
    second = json.loads(file.read_text())
    assert tries == ["medusa1", "medusa2", "medusa1"]
    assert second["parts"].keys() == first["parts"].keys()
    for name, part in first["parts"].items():
        assert (second["parts"][name] == part) == ("error" not in part)
    (step,) = second["parts"]["train medusa2 tiny"]["rows"]
    # Two rows of 16 tokens, in the half second that the clock goes on between two looks at it.
    assert step["step_ms"]["median"] == 500
    assert step["tokens_per_second"]["median"] == 64
    assert step["compiled_bytes"]["aliased"] > 0
    sizes = [row["nodes"] for row in second["parts"]["steps tiny, batch 2"]["rows"]]
    assert sizes == [1, 8]
