"""The options of a server, which its command makes flags."""

import dataclasses

from medusa_jax.options import option


@dataclasses.dataclass(kw_only=True)
class ServeOptions:
    """What to serve, and where."""

    model: str | None = option(None, help="Hugging Face directory or hub id, with or without heads "
        "inside, GGUF file, or smollm2 (default: the small model of the package)")  # fmt: skip
    heads: str | None = option(None, help="directory, file or hub id of Medusa heads (default: "
        "those found with the model)")  # fmt: skip
    served_model_name: str | None = option(None, help="what requests call it (default: as --model)")
    host: str = option("127.0.0.1", help="address to listen at; 0.0.0.0 for all of this machine's")
    port: int = option(8000, least=0, most=65535, help="0 takes a free port")
    slots: int = option(16, least=1, help="texts decoded together")
    max_waiting: int = option(256, least=0, help="texts that may wait for a slot; more are refused")
    api_key_env: str | None = option(None, metavar="NAME", help="environment variable with the "
        "key that clients must send")  # fmt: skip
    tree: str = option("auto", help="as in decode.py")
    autoregressive: bool = option(False, help="plain decoding, one token a step")
    chat_template: str | None = option(None, help="vicuna, zephyr or a Jinja file (default: the "
        "tokenizer's)")  # fmt: skip
    max_length: int | None = option(None, help="prompt and text together (default: the context)")
    dtype: str | None = option(None, choices=("float32", "bfloat16"), help="default: float32 on a "
        "CPU, else bfloat16")  # fmt: skip
    mesh: str | None = option(None, metavar="tensor=N", help="split model and work over N devices "
        "(default: one)")  # fmt: skip
    debug: bool = False
