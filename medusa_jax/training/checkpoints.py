"""Checkpoints of a run: orbax, written in the background, the last few kept and the best.

A checkpoint is complete or absent: orbax writes it under another name and
renames it. Frozen weights are not in it; they are read from the model again.
"""

import contextlib
import logging
import re
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from medusa_jax.errors import InputError
from medusa_jax.training import orbax_noise
from medusa_jax.training.checksums import checksums
from medusa_jax.training.step import TrainState
from medusa_jax.training.workdir import is_address, open_workdir

log = logging.getLogger(__name__)

_CHECKSUMS = "checksums"  # key of the metadata beside a checkpoint's values
_LOSS = "eval_loss"  # and of its metrics


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message names the last good one."""


class Checkpoints:
    """The checkpoints of one working directory."""

    def __init__(self, workdir: str | Path, keep: int | None = None) -> None:
        """Opens them to write, or, without `keep`, to read only.

        Raises:
          InputError: what lies there cannot be read.
        """
        orbax_noise.silence()
        place = open_workdir(workdir)
        self.directory = (place if is_address(place) else place.absolute()) / "checkpoints"
        best = managers.BestN(
            get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(n=keep), best]),
            best_fn=_loss,
            best_mode="min",
            create=keep is not None,
            read_only=keep is None,
            cleanup_tmp_directories=keep is not None,  # which killed runs leave behind
        )
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"{self.directory} is a file, expected the directory of checkpoints")
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
            self._saved = self._manager.latest_step()
        except Exception as error:
            raise InputError(f"{self.directory} cannot be read: {_reason(error)}") from None

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """All steps kept, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, eval_loss: float | None = None) -> None:
        """Starts writing a checkpoint; that of the same step is not written twice.

        Args:
          eval_loss: held-out loss of this state, if it was evaluated. The checkpoint with the
            lowest is kept beside the newest.

        Raises:
          CheckpointError: this or the one before could not be written.
        """
        step = int(state.step)
        if step == self._saved:
            return
        tree = _tree(state)
        try:
            self._manager.save(
                step,
                args=ocp.args.StandardSave(tree),
                metrics=None if eval_loss is None else {_LOSS: eval_loss},
                custom_metadata={_CHECKSUMS: checksums(tree)},
            )
        except Exception as error:
            raise self._failed(error) from None
        self._saved = step

    def wait(self) -> None:
        """Returns when all that was saved is on disk; raises as `save`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from None

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state at a step, on the devices that `abstract` names.

        Raises:
          InputError: it is not of this run, is incomplete, or holds other values than were
            written; says which older checkpoints there are.
        """
        try:
            written = (self._manager.metadata(step).custom_metadata or {}).get(_CHECKSUMS)
            tree = self._manager.restore(step, args=ocp.args.StandardRestore(_tree(abstract)))
        except Exception as error:
            orbax_noise.forget(error)
            raise self._damaged(step, _reason(error)) from None
        if written is None:
            log.warning("%s has no checksums, so it is not verified", self.directory / str(step))
            written = checksums(tree)
        if wrong := [path for path, value in checksums(tree).items() if written.get(path) != value]:
            raise self._damaged(step, f"{wrong[0]} holds other values than were written")
        return TrainState(tree["step"], tree["trainable"], tree["opt_state"])

    def close(self) -> None:
        """Waits for the background and lets it go."""
        self._manager.close()

    @property
    def last_good(self) -> str:
        """Where the newest complete checkpoint lies, in words."""
        complete = [step for step in self.steps if self._complete(step)]
        return str(self.directory / str(complete[-1])) if complete else "there is none yet"

    def _failed(self, error: Exception) -> CheckpointError:
        orbax_noise.forget(error)
        if jax.process_index() == 0:  # what is half written may be what fills the disk
            for half in self.directory.glob("*.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    epath.Path(half).rmtree()
        return CheckpointError(
            f"a checkpoint could not be written to {self.directory}: {_reason(error)}; the last "
            f"good one: {self.last_good}"
        )

    def _damaged(self, step: int, reason: str) -> InputError:
        place = self.directory / str(step)
        older = [str(other) for other in self.steps if other < step]
        return InputError(
            f"{place} is no whole checkpoint of this run: {reason}. "
            + (
                f"Older ones: {', '.join(older)}; delete {place} to go on from {older[-1]}"
                if older
                else "No older one is kept: give another --workdir"
            )
        )

    def _complete(self, step: int) -> bool:
        return (self.directory / str(step) / "_CHECKPOINT_METADATA").is_file()


def _loss(metrics: dict[str, float]) -> float:
    return metrics[_LOSS]


def _reason(error: Exception) -> str:
    """What the system said, else the first line; libraries bury it in details of theirs."""
    text = str(error).strip() or type(error).__name__
    if known := re.search(r"No space left on device|Disk quota exceeded|File too large", text):
        return known[0].lower()
    return text.splitlines()[0].partition(" See full TensorStore details")[0][:300]


def _tree(state: TrainState) -> dict:
    return {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
