"""Servers by name: what each was started with, where it listens, and whether it still runs.

A record is a file of the user's state folder, `$XDG_STATE_HOME/latentmill/serve/<name>.json`, which
nobody else may read: it holds the token, so that `query NAME` works. A process number comes again,
so a process is known by when it began as well; and a home folder may be shared by machines, so a
record says which one it is of.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.client import Client
from shards.canonical import canonical_json
from shards.errors import UserError
from shards.lock import held_folder
from shards.storage import write_whole

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


@dataclass(frozen=True)
class ServerProcess:
    """A process of some machine, known by when it began."""

    host: str
    pid: int
    started: str
    """Boot of the machine and its clock's ticks since; empty where it had ended at once."""

    @property
    def is_here(self) -> bool:
        """Whether it is one of this machine, where alone it can be looked at."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether it runs; of a process of another machine that cannot be said."""
        assert self.is_here
        return started_at(self.pid) == self.started != ""


@dataclass(frozen=True)
class Deployment:
    """A server that was started by name."""

    name: str
    url: str
    token: str
    process: ServerProcess
    since: str
    """When it was started: ISO 8601, in UTC."""
    log: str
    settings: dict[str, Any]
    """What it was started with."""

    def client(self, **options: Any) -> Client:
        """Of this server; see `Client`."""
        return Client(self.url, self.token, **options)

    @property
    def is_gone(self) -> bool:
        """Whether its process has ended without having been taken down."""
        return self.process.is_here and not self.process.is_alive


def here(pid: int) -> ServerProcess:
    """A process of this machine."""
    return ServerProcess(socket.gethostname(), pid, started_at(pid))


def started_at(pid: int) -> str:
    """When a process began; empty when there is none, or it has ended and not been fetched yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # The second field, a name in brackets, may hold anything: count from its end (proc(5)).
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else f"{boot}:{fields[18]}"


def state_folder() -> Path:
    """Where the records and logs are; made when missing, for the user alone."""
    home = os.environ.get("XDG_STATE_HOME", "")
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "state"
    folder = base / "latentmill" / "serve"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        remedy = "set XDG_STATE_HOME to a folder of yours"
        raise UserError(folder, f"cannot be used ({error.strerror})", remedy=remedy) from None
    return folder


@contextmanager
def sole_change() -> Iterator[None]:
    """Only one process at a time starts servers or forgets them."""
    with held_folder(state_folder()):
        yield


def check_name(name: str) -> None:
    """It becomes a file's name.

    Raises:
        UserError: it cannot.
    """
    if not _NAME.fullmatch(name):
        wanted = "a name of small letters, digits, - and _, such as demo"
        raise UserError("name", f"{name!r}", wanted=wanted)


def find_deployment(name: str) -> Deployment | None:
    """The record of this name, of a server that runs or not.

    Raises:
        UserError: it cannot be read.
    """
    check_name(name)
    path = _record_path(name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Deployment(**{**data, "process": ServerProcess(**data["process"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        remedy = f"end the server, if it runs, and delete {path}"
        raise UserError(path, f"cannot be read ({error})", remedy=remedy) from None


def recorded_deployment(name: str) -> Deployment:
    """The record of this name.

    Raises:
        UserError: there is none.
    """
    found = find_deployment(name)
    if found is None:
        names = [other.name for other in all_deployments()]
        wanted = f"one of {', '.join(names)}" if names else ""
        remedy = f"python -m serve up {name} --source ..."
        raise UserError(name, "no server of this name", wanted=wanted, remedy=remedy)
    return found


def running_deployment(name: str) -> Deployment:
    """The server of this name, which runs.

    Raises:
        UserError: there is none, or it has ended.
    """
    found = recorded_deployment(name)
    if found.is_gone:
        remedy = f"see {found.log}; python -m serve up {name} ... starts it again"
        raise UserError(name, f"its process {found.process.pid} has ended", remedy=remedy)
    return found


def all_deployments() -> list[Deployment]:
    """All records, by name."""
    names = sorted(path.stem for path in state_folder().glob("*.json"))
    found = (find_deployment(name) for name in names if _NAME.fullmatch(name))
    return [deployment for deployment in found if deployment is not None]


def remember(deployment: Deployment) -> None:
    """Write its record."""

    def fill(path: Path) -> None:
        path.chmod(0o600)
        path.write_text(canonical_json(asdict(deployment)), encoding="utf-8")

    write_whole(_record_path(deployment.name), fill)


def forget(deployment: Deployment) -> None:
    """Delete its record, unless another server has taken the name meanwhile; its log stays."""
    with sole_change():
        if find_deployment(deployment.name) == deployment:
            _record_path(deployment.name).unlink()


def log_path(name: str) -> Path:
    """What its processes print."""
    return state_folder() / f"{name}.log"


def _record_path(name: str) -> Path:
    return state_folder() / f"{name}.json"
