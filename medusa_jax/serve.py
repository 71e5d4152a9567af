"""Serves a model to many users at once, with OpenAI's interface over HTTP."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from medusa_jax.cli.start import start

    start("serve")

from medusa_jax.cli import runner
from medusa_jax.errors import needs
from medusa_jax.server.options import ServeOptions

EXAMPLE = "python -m medusa_jax.serve --model DIR --heads DIR --slots 16 --port 8000"


def run(options: ServeOptions) -> None:
    """Serves until a signal."""
    with needs("serve"):
        from medusa_jax.server.run import serve

    serve(options)


def main(arguments: list[str] | None = None) -> None:
    """The command `medusa-serve`."""
    runner.command(run, ServeOptions, __doc__ or "", EXAMPLE, arguments)
