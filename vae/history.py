"""What happened in a run, epoch by epoch: the scalars that it writes for TensorBoard, kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class History:
    """The means of a run's scalars, epoch by epoch.

    It is saved with the run, so that a resumed one has all of it. (TensorBoard's files have it,
    too, but reading them takes longer than many a run.) ``epoch`` is the one whose values are
    added, counted from 0; the run sets it.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.sums: dict[str, dict[int, tuple[float, int]]] = {}

    def add(self, tag: str, value: float) -> None:
        """Add a value of the epoch."""
        epochs = self.sums.setdefault(tag, {})
        total, count = epochs.get(self.epoch, (0.0, 0))
        epochs[self.epoch] = total + value, count + 1

    def curve(self, tag: str) -> tuple[list[int], list[float]]:
        """Return after how many epochs a scalar had which mean value; empty lists if it had none.

        An epoch that was begun and not ended counts like the others.
        """
        epochs = self.sums.get(tag, {})
        counts = [1 + epoch for epoch in epochs]
        means = [total / count for total, count in epochs.values()]
        return counts, means

    def state_dict(self) -> dict[str, Tensor]:
        """Return for each scalar a row of epoch, sum and count, [epochs, 3]."""
        return {
            tag: torch.tensor(
                [(epoch, *sums) for epoch, sums in epochs.items()], dtype=torch.double
            )
            for tag, epochs in self.sums.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state_dict`` returned."""
        self.sums = {
            tag: {int(epoch): (total, int(count)) for epoch, total, count in rows.tolist()}
            for tag, rows in state.items()
        }


class HistoryWriter(SummaryWriter):
    """TensorBoard's writer, which also adds each scalar to a history."""

    def __init__(self, folder: Path | str, history: History) -> None:
        super().__init__(folder)
        self.history = history

    def add_scalar(self, tag: str, scalar_value: Any, *rest: Any, **more: Any) -> None:
        """Write a value, as the parent class does."""
        value = as_number(scalar_value)
        super().add_scalar(tag, value, *rest, **more)
        self.history.add(tag, value)

    def add_scalars(
        self, main_tag: str, tag_scalar_dict: Mapping[str, Any], *rest: Any, **more: Any
    ) -> None:
        """Write several values for one chart, as the parent class does."""
        values = {name: as_number(value) for name, value in tag_scalar_dict.items()}
        super().add_scalars(main_tag, values, *rest, **more)
        for name, value in values.items():
            self.history.add(f"{main_tag}/{name}", value)


def as_number(value: Any) -> float:
    """Return the number in a tensor, or a number of any kind."""
    return value.item() if isinstance(value, Tensor) else float(value)


def still_falls(values: list[float], share: float = 0.01) -> bool:
    """Return whether the last fifth of a curve still made it lower, by so much of it.

    Curves scatter, so the means of the two halves of that fifth are compared. ``False`` where it
    has too few points to tell.
    """
    last = values[-max(1, len(values) // 5) :]
    half = len(last) // 2
    if half < 2:
        return False
    before, after = sum(last[:half]) / half, sum(last[-half:]) / half
    return before - after > share * abs(after)


def story_epochs(epochs: int, moments: int = 8) -> list[int]:
    """Return after how many of a run's epochs it keeps pictures of what it can do.

    They lie close together at first, when much happens, and the last one is the end:
    epochs * (k / moments)**2. Of the post's 500 epochs: 8, 31, 70, 125, 195, 281, 383 and 500.
    """
    return sorted({max(1, round(epochs * (k / moments) ** 2)) for k in range(1, moments + 1)})
