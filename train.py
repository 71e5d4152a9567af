"""Trains Medusa heads; `python train.py --help` lists the flags, `configs/` has the recipes."""

from medusa_jax.train import main

if __name__ == "__main__":
    main()
