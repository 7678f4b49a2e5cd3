"""Which samples were in a step whose loss or gradient was not finite.

The device notes the step and the rows; the host keeps the numbers of the samples since it last
looked, and turns them into keys only if there is something to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError
from shards.storage import Location, write_text_whole

_FILE = "broken-batch.json"
_KEYS_IN_MESSAGE = 4


class BrokenBatch:
    """Remembers one process's samples of the steps since the host last looked.

    Args:
        num_rows: of this process in a step.
        device: of the losses.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._samples: dict[int, np.ndarray] = {}
        self._rows = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def remember(self, step: int, samples: np.ndarray) -> None:
        """Keep the numbers of a step's samples."""
        self._samples[step] = samples

    def note_rows(self, step: int, losses: Tensor, broken_step: Tensor) -> None:
        """Keep which of this step's samples had a loss that is not finite, if it broke now.

        Args:
            step: its number.
            losses: [B], of this process's samples.
            broken_step: see `Update`; may be the number of this step.
        """
        self._rows |= ~losses.isfinite() & (broken_step == step)

    def forget(self) -> None:
        """The steps so far were fine."""
        self._samples.clear()

    def describe(self, step: int, keys_of: Callable[[np.ndarray], list[str]]) -> dict[str, Any]:
        """What this process has to say of a broken step; waits for the device.

        Returns:
            `keys` of its samples, and `broken`, those of them whose own loss was not finite.
        """
        if step not in self._samples:
            return {"keys": [], "broken": []}
        keys = keys_of(self._samples[step])
        return {
            "keys": keys,
            "broken": [
                key for key, is_broken in zip(keys, self._rows.tolist(), strict=True) if is_broken
            ],
        }


def broken_batch_error(
    run: Location, step: int, reports: list[dict[str, Any]], *, write: bool
) -> UserError:
    """The error that ends the run, and the file that names all samples of the step.

    Args:
        run: folder of the run.
        step: number of the update that was not made.
        reports: of all processes, see `BrokenBatch.describe`.
        write: whether to write the file.
    """
    keys = [key for report in reports for key in report["keys"]]
    broken = [key for report in reports for key in report["broken"]]
    if write:
        document = {"step": step, "keys": keys, "keys_with_loss_not_finite": broken}
        write_text_whole(run / _FILE, json.dumps(document, indent=1) + "\n")
    named = broken or keys
    more = f" and {len(named) - _KEYS_IN_MESSAGE} more" if len(named) > _KEYS_IN_MESSAGE else ""
    what = "the loss of" if broken else "a gradient, of the batch"
    return UserError(
        run,
        f"at step {step} {what} {', '.join(named[:_KEYS_IN_MESSAGE])}{more} is not finite; no "
        f"update was made from it ({_FILE} names the whole batch)",
        remedy="a lower --learning-rate or --max-grad-norm in another --output-dir, with "
        "--init-from <this run> to go on from its last checkpoint; python -m shards verify --full "
        "<data> if one sample is to blame",
    )
