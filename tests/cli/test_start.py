"""How a command starts."""

import os
import sys

import pytest

from medusa_jax.cli import start as starting


def test_jax_does_not_try_libtpu_without_a_tpu(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A TPU, or a platform that the user chose, is left as it is."""
    (tmp_path / "libtpu.py").touch()
    for devices, before, platform in (
        (["nul*"], None, None),
        (["no-such-device"], "cuda", "cuda"),
        (["no-such-device*", "nor/this*"], None, "cpu"),
    ):
        monkeypatch.setattr(starting, "_DEVICES", devices)
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        if before:
            monkeypatch.setenv("JAX_PLATFORMS", before)
        monkeypatch.syspath_prepend(tmp_path)
        starting._leave_out_absent_tpus()
        assert os.environ.get("JAX_PLATFORMS") == platform
    assert "libtpu" not in sys.modules
