"""What SageMaker tells a training container.

A container of one's own finds it in files below /opt/ml/input/config. The variables SM_* are set by
SageMaker's toolkits, where a job is started through them; they win.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError

_CHANNEL = "SM_CHANNEL_"


@dataclass(frozen=True)
class Environment:
    """A training job, as one of its machines sees it.

    Args:
        hyperparameters: by name, as text, without what the SDK adds for itself.
        channels: folder of each input channel.
        hosts: all machines of the job, sorted: the same order on each.
        current_host: this one.
        network_interface: the one that leads to the others; empty: SageMaker does not say.
        num_gpus: of this machine; None: SageMaker does not say.
        model_dir: what is here at the end becomes model.tar.gz.
        checkpoint_dir: kept in step with the job's S3 URI, and filled from there at the start.
        output_dir: `failure` in here becomes the job's FailureReason.
    """

    hyperparameters: Mapping[str, str]
    channels: Mapping[str, Path]
    hosts: tuple[str, ...]
    current_host: str
    network_interface: str
    num_gpus: int | None
    model_dir: Path
    checkpoint_dir: Path
    output_dir: Path

    @property
    def rank(self) -> int:
        """Number of this machine."""
        return self.hosts.index(self.current_host)


def output_dir(variables: Mapping[str, str]) -> Path:
    """Where a failure is told, whatever else is wrong."""
    return Path(variables.get("SM_OUTPUT_DIR") or _base(variables) / "output")


def read_environment(variables: Mapping[str, str]) -> Environment:
    """The job that this process is part of.

    Args:
        variables: of the process; SAGEMAKER_BASE_DIR takes the place of /opt/ml.

    Raises:
        UserError: this is no training job, or SageMaker says something that makes no sense.
    """
    base = _base(variables)
    config = base / "input" / "config"
    if "SM_HOSTS" not in variables and not config.is_dir():
        raise UserError(
            "train",
            f"neither SM_HOSTS nor {config}: this is no SageMaker job",
            remedy="docker run IMAGE train PRESET --data ... --output-dir ...",
        )
    resources = _read(config / "resourceconfig.json")
    hosts = _json(variables, "SM_HOSTS", resources.get("hosts", ["algo-1"]))
    if not (isinstance(hosts, list) and hosts and all(isinstance(host, str) for host in hosts)):
        raise UserError("SM_HOSTS", f"{hosts!r}", wanted="a JSON list of names")
    current = str(variables.get("SM_CURRENT_HOST") or resources.get("current_host", hosts[0]))
    if current not in hosts:
        raise UserError("SM_CURRENT_HOST", current, wanted=f"one of {', '.join(hosts)}")
    num_gpus = variables.get("SM_NUM_GPUS", "")
    if num_gpus and not num_gpus.isdecimal():
        raise UserError("SM_NUM_GPUS", num_gpus, wanted="a number")
    return Environment(
        hyperparameters=_hyperparameters(variables, config),
        channels=_channels(variables, config, base),
        hosts=tuple(sorted(hosts)),
        current_host=current,
        network_interface=variables.get("SM_NETWORK_INTERFACE_NAME")
        or resources.get("network_interface_name", ""),
        num_gpus=int(num_gpus) if num_gpus else None,
        model_dir=Path(variables.get("SM_MODEL_DIR") or base / "model"),
        checkpoint_dir=Path(variables.get("SM_CHECKPOINT_DIR") or base / "checkpoints"),
        output_dir=output_dir(variables),
    )


def _base(variables: Mapping[str, str]) -> Path:
    return Path(variables.get("SAGEMAKER_BASE_DIR") or "/opt/ml")


def _hyperparameters(variables: Mapping[str, str], config: Path) -> dict[str, str]:
    given = _json(variables, "SM_HPS", _read(config / "hyperparameters.json"))
    if not isinstance(given, dict):
        raise UserError("SM_HPS", f"{given!r}", wanted="a JSON object")
    return {
        name: _text(value) for name, value in given.items() if not name.startswith("sagemaker_")
    }


def _text(value: Any) -> str:
    """A value as a flag takes it. The SDK wraps values in JSON, the API leaves them as they are."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return str(value)


def _channels(variables: Mapping[str, str], config: Path, base: Path) -> dict[str, Path]:
    names = _read(config / "inputdataconfig.json")
    folders = {name: base / "input" / "data" / name for name in names}
    for variable, folder in variables.items():
        if variable.startswith(_CHANNEL):
            folders[variable.removeprefix(_CHANNEL).lower()] = Path(folder)
    return folders


def _json(variables: Mapping[str, str], name: str, default: Any) -> Any:
    if name not in variables:
        return default
    try:
        return json.loads(variables[name])
    except ValueError as error:
        raise UserError(name, f"no JSON ({error})") from None


def _read(path: Path) -> dict[str, Any]:
    """A file of SageMaker's; one that is not there says nothing."""
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(path, f"no JSON ({error})") from None
    if not isinstance(document, dict):
        raise UserError(path, "not what SageMaker writes", wanted="a JSON object")
    return document
