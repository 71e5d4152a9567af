"""Trains Medusa heads; `python train.py --help` lists the flags, `configs/` has the recipes."""

from medusa_jax.cli.start import start

if __name__ == "__main__":
    start("train")
