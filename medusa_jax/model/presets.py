"""Shapes of well-known backbones, for timing and compiling where their weights are not at hand."""

from medusa_jax.model.config import ModelConfig
from medusa_jax.model.rope import Llama3

_LLAMA3 = Llama3(factor=8.0, original_context=8192)
PRESETS = {
    "smollm2-135m": ModelConfig(
        49152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, 100000.0, tied=True
    ),
    "110m": ModelConfig(32000, 768, 2048, 12, 12, 12, 64, 1024),
    "llama2-7b": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5),
    "llama2-13b": ModelConfig(32000, 5120, 13824, 40, 40, 40, 128, 4096, 1e-5),
    "llama1-33b": ModelConfig(32000, 6656, 17920, 60, 52, 52, 128, 2048, 1e-6),
    "mistral-7b": ModelConfig(
        32000, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5, windows=(4096,) * 32
    ),
    "llama3-8b": ModelConfig(
        128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5, 500000.0, _LLAMA3
    ),
    "qwen3-8b": ModelConfig(
        151936, 4096, 12288, 36, 32, 8, 128, 40960, 1e-6, 1000000.0, qk_norm=True
    ),
}  # fmt: skip
