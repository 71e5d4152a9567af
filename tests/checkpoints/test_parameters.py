"""Parameters that are read when they are needed: as their shapes say, once, after compilation."""

from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from helpers.models import TinyModel

from medusa_jax.checkpoints.load import load_model
from medusa_jax.checkpoints.parameters import Parameters, Part
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.serving.engine import Engine, run_jobs
from medusa_jax.serving.jobs import Job
from medusa_jax.serving.programs import Programs


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("quantize", ["none", "int8", "fp8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_what_their_shapes_say(saved: Path, dtype: str, quantize: str, kernels: bool):
    how = {"dtype": dtype, "quantize": quantize, "kernels": kernels}
    model = load_model(saved, **how, read=False)
    assert model.parameters.unread
    shapes = model.parameters.shapes
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, model.params)
    assert not model.parameters.unread
    assert model.parameters.shapes["backbone"] is shapes["backbone"]  # programs stay theirs
    chex.assert_trees_all_equal(model.params, load_model(saved, **how).params)


def test_parts_are_read_once_and_shared():
    reads = []

    def part(name: str) -> Part:
        return Part(
            {"x": jax.ShapeDtypeStruct((2,), "float32")}, lambda: reads.append(name) or name
        )

    first = Parameters({"backbone": part("backbone"), "heads": part("heads")})
    second = first.having(heads=part("others"))
    assert second.arrays == {"backbone": "backbone", "heads": "others"}
    assert reads == ["backbone", "others"]  # not the heads that were replaced
    assert first.unread
    assert first.arrays == {"backbone": "backbone", "heads": "heads"}
    assert reads == ["backbone", "others", "heads"]
    assert not first.unread
    assert Parameters.of(first) is first


def test_the_first_job_is_compiled_before_anything_is_read(tiny: TinyModel, monkeypatch):
    events = []
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.params)
    parameters = Parameters(
        {
            name: Part(shapes[name], lambda name=name: events.append("read") or tiny.params[name])
            for name in tiny.params
        }
    )
    get = Programs.get

    def noted(self: Programs, name: str, *args: object, **kwargs: object) -> object:
        before = self.compile_seconds
        program = get(self, name, *args, **kwargs)
        events.extend([name] * (self.compile_seconds > before))
        return program

    monkeypatch.setattr(Programs, "get", noted)
    decoder = Decoder(tiny.config, drafter_of_heads(tiny.heads, Tree.from_lists([[0], [0, 0]])))
    engine, again = (Engine(decoder, parameters, slots=2, stop_ids=(2,)) for _ in range(2))
    jobs = [Job([1, 5, 9], 40), Job([2, 7], 20)]
    done = run_jobs(engine, jobs)
    assert events == ["empty", "read", "run", *["read"] * len(tiny.params)]
    assert run_jobs(again, jobs) == done
    assert len(events) == 3 + len(tiny.params)  # the same programs, the same numbers
    assert run_jobs(Engine(decoder, tiny.params, slots=2, stop_ids=(2,)), jobs) == done
    assert engine.stats.compile_seconds > 0


def test_a_mesh_is_in_the_shapes(saved: Path):
    model = load_model(saved, mesh="tensor=1", read=False)
    placed = [leaf.sharding for leaf in jax.tree.leaves(model.parameters.shapes)]
    assert placed == [leaf.sharding for leaf in jax.tree.leaves(model.params)]
    assert all(np.prod(place.mesh.devices.shape) == 1 for place in placed)
