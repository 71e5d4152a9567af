"""What a program imports to decode: `from medusa_jax.decode import Decoder, outputs`."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from medusa_jax.cli.start import start

    start("decode")

from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import Emitted, Output, State, outputs
from medusa_jax.serving.generator import Generator

__all__ = ["Decoder", "Emitted", "Generator", "Output", "State", "outputs"]
