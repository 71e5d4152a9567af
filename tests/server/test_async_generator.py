"""The engine as a library: coroutines share its slots and write what each writes alone."""

import asyncio
import contextlib

import pytest

from medusa_jax.decoding.acceptance import Greedy, Lossless
from medusa_jax.decoding.sampling import RowSampling
from medusa_jax.errors import InputError
from medusa_jax.server.service import Service
from medusa_jax.serving.async_generator import AsyncGenerator
from medusa_jax.serving.worker import Busy

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STORY, WARM = "Once upon a time", RowSampling(0.8, top_p=0.9)


def alone(generator: AsyncGenerator, seed: int, sampling: RowSampling) -> str:
    """The text of `Generator` for the same prompt, seed and sampling."""
    scheme = Lossless(0.8, top_p=0.9) if sampling.temperature else Greedy()
    single = generator.generator
    single = single.with_tree(single.tree, scheme, seed=seed, batch_size=1, by_load=False)
    return single.generate([STORY], max_new_tokens=20)[0].text


def test_coroutines_write_what_each_writes_alone(service: Service):
    generator = service.medusa
    asked = [(seed, WARM if seed % 2 else RowSampling()) for seed in range(6)]

    async def answers() -> list[str]:
        return await asyncio.gather(
            *(
                generator.complete(STORY, max_new_tokens=20, sampling=how, seed=seed)
                for seed, how in asked
            )
        )

    texts = asyncio.run(answers())
    assert texts == [alone(generator, *one) for one in asked]
    assert len(set(texts)) > 2


def test_pieces_have_the_tokens_of_each_step(service: Service):
    async def pieces() -> list:
        return [piece async for piece in service.medusa.generate(STORY, max_new_tokens=60)]

    found = asyncio.run(pieces())
    output = found[-1].output
    assert [n for piece in found for n in piece.steps] == output.tokens_per_step
    assert [token for piece in found for token in piece.token_ids] == output.token_ids
    assert max(output.tokens_per_step) > 1


def test_who_leaves_gives_back_the_slot_and_errors_are_the_librarys(service: Service):
    generator = service.medusa

    async def leave() -> None:
        async with contextlib.aclosing(generator.generate(STORY, max_new_tokens=200)) as text:
            async for _ in text:
                break
        assert not generator.worker.taken
        with pytest.raises(InputError, match="exceed"):
            await generator.complete(STORY, max_new_tokens=5000)
        many = [generator.complete(STORY, max_new_tokens=2) for _ in range(17)]
        results = await asyncio.gather(*many, return_exceptions=True)
        assert sum(isinstance(result, Busy) for result in results) == 1

    asyncio.run(leave())
