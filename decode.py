"""Decodes prompts with Medusa; `python decode.py --help` lists the flags."""

from medusa_jax.cli.start import start

if __name__ == "__main__":
    start("decode")
