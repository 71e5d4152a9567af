"""Self-distillation data: the model itself answers the prompts of a dataset."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from medusa_jax.cli.start import start

    start("distill")

from medusa_jax.cli import runner
from medusa_jax.serving.distill_options import DistillOptions
from medusa_jax.serving.distillation import distill

EXAMPLE = """python -m medusa_jax.distill --model DIR --heads DIR --data chats.json.gz \\
      --output answers.jsonl --batch_size 64
  python -m medusa_jax.distill --model DIR --autoregressive --data stories.txt --words 4-12 \\
      --temperature 0 --output stories.jsonl
  python -m medusa_jax.distill --model DIR --questions 1000 --max_new_tokens 256 \
      --output questions.jsonl"""


def main(arguments: list[str] | None = None) -> None:
    """The command `medusa-distill`."""
    runner.command(distill, DistillOptions, __doc__ or "", EXAMPLE, arguments)
