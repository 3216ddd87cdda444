"""The log of a training run: a CSV table beside the model and, where asked for, TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpurho.errors import MissingDependencyError, StoreError

COLUMNS = (
    "epoch",
    "step",
    "train_nll",
    "kl_per_point",
    "validation_rmse",
    "validation_nll",
    "learning_rate",
    "seconds",
)


class TrainingLog:
    """Rows of a run, one per epoch, in memory and on disk.

    Parameters
    ----------
    path : Path
        The table; begun anew by `start`.
    tensorboard : Path, optional
        Folder of the event files.

    Raises
    ------
    MissingDependencyError
        When TensorBoard is asked for and not installed.
    StoreError
        From each method that writes, where the disk refuses.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        self.path, self.rows = path, list[dict[str, float]]()
        self._board: Any = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise MissingDependencyError(
                    "TensorBoard is not installed; pip install tensorboard, or leave the option out"
                ) from None
            self._board = SummaryWriter(str(tensorboard))

    def start(self) -> None:
        """Begin an empty table."""
        self.rows = []
        self._write("w", ",".join(COLUMNS) + "\n")

    def resume(self, rows: list[dict[str, float]]) -> None:
        """Go on after some rows; later ones in the table, which will be written again, are cut off."""
        self.rows = rows
        self._write("w", "".join([",".join(COLUMNS) + "\n", *(_line(row) for row in rows)]))

    def add(self, row: dict[str, float]) -> None:
        """Add a row with the entries `COLUMNS`."""
        self.rows.append(row)
        self._write("a", _line(row))
        if self._board is not None:
            for name in COLUMNS[2:]:
                self._board.add_scalar(name, row[name], int(row["step"]))
            self._board.flush()

    def _write(self, mode: str, text: str) -> None:
        try:
            with open(self.path, mode) as file:
                file.write(text)
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror}; the last checkpoint is safe, make room and run the"
                " same command again"
            ) from None

    def close(self) -> None:
        """Close the event files."""
        if self._board is not None:
            self._board.close()


def _line(row: dict[str, float]) -> str:
    return ",".join(f"{row[name]:.6g}" for name in COLUMNS) + "\n"


class StepBar:
    """A progress bar over the steps of a run, to be called after each of them; a context manager."""

    def __init__(self, shown: bool, name: str = "train") -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=name, unit="step", disable=None if shown else True, mininterval=1.0)

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __call__(self, run: Any, likelihood: float) -> None:
        """Show a step of the `Trainer` `run`."""
        bar = self._bar
        if bar.disable:
            return
        if bar.total is None:
            bar.total, bar.initial, bar.n = run.n_steps, run.step - 1, run.step - 1
        rows = run.history
        rmse = f", validation RMSE {rows[-1]['validation_rmse']:.2e} e/A^3" if rows else ""
        bar.set_postfix_str(f"nll {likelihood:.3f}{rmse}", refresh=False)
        bar.update()


__all__ = ["COLUMNS", "StepBar", "TrainingLog"]
