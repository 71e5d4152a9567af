"""Checkpoints of a run: orbax, written in the background, the last few kept.

A checkpoint is complete or absent: orbax writes it under another name and
renames it. Frozen weights are not in it; they are read from the model again.
"""

import logging
from pathlib import Path

import orbax.checkpoint as ocp

from medusa_jax.errors import InputError
from medusa_jax.training.step import TrainState
from medusa_jax.training.workdir import is_address, open_workdir

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message names the last good one."""


class Checkpoints:
    """The checkpoints of one working directory."""

    def __init__(self, workdir: str | Path, keep: int | None = None) -> None:
        """Opens them to write, or, without `keep`, to read only."""
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells all it does; we raise
        place = open_workdir(workdir)
        self.directory = (place if is_address(place) else place.absolute()) / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=keep is not None,
            read_only=keep is None,
            cleanup_tmp_directories=keep is not None,  # which killed runs leave behind
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._saved = self._manager.latest_step()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """All steps kept, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Starts writing a checkpoint; that of the same step is not written twice.

        Raises:
          CheckpointError: this or the one before could not be written.
        """
        step = int(state.step)
        if step == self._saved:
            return
        try:
            self._manager.save(step, args=ocp.args.StandardSave(_tree(state)))
        except Exception as error:
            raise self._failed(error) from error
        self._saved = step

    def wait(self) -> None:
        """Returns when all that was saved is on disk; raises as `save`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The state at a step (default: the newest), on the devices that `abstract` names."""
        step = self.latest if step is None else step
        try:
            tree = self._manager.restore(step, args=ocp.args.StandardRestore(_tree(abstract)))
        except (ValueError, KeyError, OSError) as error:
            raise InputError(
                f"{self.directory / str(step)} is not a readable checkpoint of this run: "
                f"{str(error).strip().splitlines()[0][:300]}"
            ) from None
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return CheckpointError(
            f"a checkpoint could not be written ({reason[:300]}); the last good one: "
            f"{self.last_good}"
        )

    def _complete(self, step: int) -> bool:
        return (self.directory / str(step) / "_CHECKPOINT_METADATA").is_file()


def _tree(state: TrainState) -> dict:
    return {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
