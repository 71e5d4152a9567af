"""The options of a server, which its command makes flags."""

import dataclasses

from medusa_jax.options import option
from medusa_jax.serving.options import ModelOptions


@dataclasses.dataclass(kw_only=True)
class ServeOptions(ModelOptions):
    """What to serve, and where."""

    served_model_name: str | None = option(None, help="what requests call it (default: as --model)")
    host: str = option("127.0.0.1", help="address to listen at; 0.0.0.0 for all of this machine's")
    port: int = option(8000, least=0, most=65535, help="0 takes a free port")
    slots: int = option(16, least=1, help="texts decoded together")
    max_waiting: int = option(256, least=0, help="texts that may wait for a slot; more are refused")
    max_logprobs: int = option(20, least=0, most=1000, help="most alternatives to a token "
        "with log-probabilities in an answer; each takes 8 bytes a token of a slot")  # fmt: skip
    api_key_env: str | None = option(None, metavar="NAME", help="environment variable with the "
        "key that clients must send")  # fmt: skip
