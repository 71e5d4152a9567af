"""Hugging Face `generate` of the same model: what Medusa is measured against.

torch and transformers' models are imported when a peer is made, not before.
"""

import dataclasses
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

from medusa_jax.errors import InputError
from medusa_jax.gguf_file import is_gguf

# What each peer adds to a plain `generate`.
PEERS: dict[str, dict[str, int]] = {"hf": {}, "hf_lookup": {"prompt_lookup_num_tokens": 10}}


@dataclasses.dataclass(frozen=True)
class Generated:
    """One text: its tokens, all of its seconds, and those until the first token."""

    token_ids: list[int]
    seconds: float
    first_seconds: float


def torch_model(directory: Path, dtype: str, device: str = "cpu") -> Any:
    """What transformers makes of a directory or of a GGUF file, on a device.

    Raises:
      InputError: it cannot load it, or the device has no room for it.
    """
    import torch
    import transformers

    how: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": False}
    if is_gguf(directory):
        how["gguf_file"] = directory.name
    place = directory.parent if is_gguf(directory) else directory
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(place), **how)
        return model.to(device)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"Hugging Face cannot load {directory}: {reason}") from None


def available() -> bool:
    """Whether torch is installed."""
    return importlib.util.find_spec("torch") is not None


class HuggingFace:
    """A model as transformers runs it, one prompt at a time."""

    def __init__(
        self,
        directory: Path,
        dtype: str,
        stop_ids: tuple[int, ...],
        suppress: tuple[int, ...],
        repetition_penalty: float = 1.0,
    ) -> None:
        """Loads the model, onto a GPU where torch knows one.

        Args:
          stop_ids: tokens that end a text; empty to go on past end-of-sequence.
          suppress: tokens never to produce.
          repetition_penalty: 1 for none.

        Raises:
          InputError: torch is missing, or transformers cannot load the model.
        """
        if not available():
            raise InputError(
                "the peers hf and hf_lookup need torch: pip install 'medusa_jax[torch]', "
                "or give --peers none"
            )
        import torch
        import transformers

        # A merged model has medusa_head.* tensors, which transformers would warn about.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.threads = os.cpu_count() or 1
        torch.set_num_threads(self.threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = torch_model(directory, dtype, self.device)
        # None of the model's own settings: those that we apply are given.
        self._model.generation_config = transformers.GenerationConfig()
        self._ends = {
            "eos_token_id": list(stop_ids) or None,
            "suppress_tokens": list(suppress) or None,
            "repetition_penalty": float(repetition_penalty),
            "pad_token_id": 0,
        }
        self._torch, self._transformers = torch, transformers

    def choose_threads(self, prompt: list[int]) -> None:
        """Takes one thread where that decodes this prompt faster than a thread for each processor.

        So it is with small models, and on a machine that others use too.
        """
        seconds = {}
        for threads in (1, self.threads):
            self._torch.set_num_threads(threads)
            tries = [self.generate(prompt, 8, sampling={}, extra={}, seed=0) for _ in range(3)]
            seconds[threads] = min(text.seconds for text in tries)
        self.threads = min(seconds, key=seconds.__getitem__)
        self._torch.set_num_threads(self.threads)

    def generate(
        self,
        prompt: list[int],
        new_tokens: int,
        *,
        sampling: dict[str, Any],
        extra: dict[str, int],
        seed: int,
    ) -> Generated:
        """One text.

        Args:
          sampling: temperature, top_k and top_p; empty for greedy decoding.
          extra: see `PEERS`.
        """
        torch = self._torch
        torch.manual_seed(seed)
        ids = torch.tensor([prompt], device=self.device)
        settings = self._transformers.GenerationConfig(
            do_sample=bool(sampling), max_new_tokens=new_tokens, **sampling, **extra, **self._ends
        )
        first: list[float] = []

        def watch(input_ids: Any, scores: Any, **_: Any) -> Any:
            if not first:
                self._wait()
                first.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=self.device)

        start = time.perf_counter()
        done = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            stopping_criteria=self._transformers.StoppingCriteriaList([watch]),
        )
        self._wait()
        end = time.perf_counter()
        return Generated(done[0, len(prompt) :].tolist(), end - start, first[0] - start)

    def _wait(self) -> None:
        if self.device == "cuda":
            self._torch.cuda.synchronize()
