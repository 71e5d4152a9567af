"""Decodes prompts with Medusa; `python decode.py --help` lists the flags."""

from medusa_jax.cli.decode_command import main

if __name__ == "__main__":
    main()
