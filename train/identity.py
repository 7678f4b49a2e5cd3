"""What makes a run the same run: refused where a resumed one would become another."""

from __future__ import annotations

from typing import Any

from shards.batch import BatchSource
from shards.errors import UserError
from train.config import TrainConfig
from train.precision import Precision
from train.unet import load_unet_config

Json = dict[str, Any]


def run_identity(config: TrainConfig, precision: Precision, batches: BatchSource) -> Json:
    """Settings and data that a run depends on, as its checkpoints keep them."""
    fields = config.defining_fields()
    unet = load_unet_config(fields.pop("unet"))  # what it says, not where it is
    fields |= {f"unet.{name}": value for name, value in unet.items()}
    fields["mixed_precision"] = precision.name  # what `auto` came to
    return {"config": fields, "batches": batches.identity}


def refuse_another_run(where: object, before: Json, now: Json) -> None:
    """Continue a run only as what it was.

    Args:
        where: the checkpoint.
        before: its `run_identity`.
        now: that of the command.

    Raises:
        UserError: names the settings that changed.
    """
    then, here = before["config"], now["config"]
    changed = [
        f"{name} {then.get(name)} -> {here.get(name)}"
        for name in sorted(then.keys() | here.keys())
        if then.get(name) != here.get(name)
    ]
    if not changed and before["batches"] != now["batches"]:
        changed = ["the dataset has other columns or shards, or other samples are held out"]
    if changed:
        raise UserError(
            where,
            f"belongs to another run: {'; '.join(changed)}",
            wanted="the settings that the run was started with",
            remedy="another --output-dir",
        )
