"""When a run has diverged: numbers that are not finite, or a loss far above its first values."""

import dataclasses
import math

FAR = 3.0  # times the larger of the first held-out loss and that of a uniform guess


class Diverged(RuntimeError):
    """The loss or its gradient is no number any more, or the loss is far above where it began."""


@dataclasses.dataclass
class Divergence:
    """Watches the loss of a run, step after step.

    Attributes:
      patience: steps in a row that the loss may stay above `limit`; 0 lets it.
      limit: `FAR` times the loss of a uniform guess, or of the first evaluation if that is more.
      above: steps in a row that the loss has been above it.

    Example: of 512 tokens a uniform guess has a loss of 6.2. A run that began with 17 and has
    patience 50 passes a spike of 20 steps, and ends after 50 steps above 51.
    """

    patience: int
    limit: float
    above: int = 0

    @classmethod
    def of(cls, patience: int, vocab_size: int) -> "Divergence":
        """Before the first evaluation."""
        return cls(patience, FAR * math.log(vocab_size))

    def began(self, held_out_loss: float) -> None:
        """Takes in the loss before the first step."""
        self.limit = max(self.limit, FAR * held_out_loss)

    def check(self, step: int, loss: float, grad_norm: float, *, last: bool) -> None:
        """Takes in a step.

        Raises:
          Diverged: the message says what is wrong, and at which step.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise Diverged(f"step {step}: loss {loss}, gradient norm {grad_norm}")
        self.above = self.above + 1 if self.patience and loss > self.limit else 0
        if self.above and (last or self.above >= self.patience):
            raise Diverged(
                f"step {step}: loss {loss:.4g}, above {self.limit:.4g} for {self.above} steps "
                f"(run.patience), which is {FAR:g} times what it began with"
            )
