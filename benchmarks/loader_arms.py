"""The arms of the loader benchmark: which there are, and each as a process that is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.peers.samples import SHAPES
from shards.errors import UserError

# Environment variables of every arm's process; each of them helps a peer.
SETTINGS = {
    # What `accelerate launch` gives; the fastest peer is faster with one thread than with two.
    "OMP_NUM_THREADS": "1",
    # The allocator keeps what was freed. Left to itself it gives batches back to the system now and
    # then, and what the page faults cost is then chance: litdata is 3 times as slow on a bad day.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}
PEERS = ("webdataset", "mds", "litdata")

_FOLDER = Path(__file__).parent
_PEERS_VENV = _FOLDER.parent / ".venv-peers"


@dataclass(frozen=True, kw_only=True)
class ArmSpec:
    """How to start one arm.

    Args:
        name: `ours`, a peer, …
        kind: `ours`, `peer` or `memcpy`.
        command: of its process.
        folder: working folder of its process; None keeps ours.
        arrays: what its batches hold.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    folder: Path | None = None
    arrays: tuple[str, ...] = tuple(SHAPES)


@dataclass
class Arm:
    """One running arm.

    Args:
        spec: how it was started.
        process: answers commands; see `benchmarks.peers.worker`.
        log: where its errors go.
        facts: what it said when it was ready.
    """

    spec: ArmSpec
    process: subprocess.Popen[str]
    log: Path
    facts: dict[str, Any] = field(default_factory=dict)

    def ask(self, command: str, skip: int, count: int) -> dict[str, Any]:
        """Pass over `skip` batches, then measure `count` of them.

        Raises:
            UserError: the process ended.
        """
        stdin = self._pipe(self.process.stdin)
        try:
            print(command, skip, count, file=stdin, flush=True)
        except BrokenPipeError:
            self._refuse()
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next line that the process prints."""
        line = self._pipe(self.process.stdout).readline()
        if not line:
            self._refuse()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _refuse(self) -> None:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "without a word")
        raise UserError(f"loader arm {self.spec.name}", f"its process ended: {last}")

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def peers_python() -> Path | None:
    """The interpreter of the peers' environment, once `make peers` has finished."""
    return _PEERS_VENV / "bin" / "python" if (_PEERS_VENV / "ready").exists() else None


def own_arms(dataset: Path, num_samples: int, batch_size: int) -> list[ArmSpec]:
    """Our reader with both columns and with one alone, and memcpy."""

    def build(name: str, kind: str, *arguments: object, **more: Any) -> ArmSpec:
        command = (sys.executable, "-m", "benchmarks.loader_own", *map(str, arguments))
        return ArmSpec(name=name, kind=kind, command=command, **more)

    both = tuple(SHAPES)
    ours = [
        build(name, "ours", "read", dataset, batch_size, ",".join(arrays), arrays=arrays)
        for name, arrays in (("ours", both), ("ours: image", both[:1]), ("ours: text", both[1:]))
    ]
    return [*ours, build("memcpy", "memcpy", "memcpy", num_samples, batch_size, arrays=())]


def peer_arm(peer: str, python: Path, folder: Path, *, batch_size: int) -> ArmSpec:
    """A peer, reading what `write_peer` wrote."""
    command = _peer_command(python, peer, "read", folder, batch_size)
    return ArmSpec(name=peer, kind="peer", command=command, folder=_FOLDER)


def write_peer(
    peer: str, python: Path, folder: Path, *, num_samples: int, samples_per_shard: int
) -> None:
    """Write the samples in a peer's own format with its own writer.

    Raises:
        UserError: it failed.
    """
    done = subprocess.run(
        _peer_command(python, peer, "write", folder, num_samples, samples_per_shard),
        cwd=_FOLDER,
        env=_environment(folder.parent),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or "without a word").splitlines()[-1]
        raise UserError(f"loader arm {peer}", f"its writer failed: {last}")


def _peer_command(python: Path, peer: str, *arguments: object) -> tuple[str, ...]:
    return (str(python), "-m", "peers", peer, *map(str, arguments))


def _environment(scratch: Path) -> dict[str, str]:
    """Settings, no network, and nothing written outside the benchmark's folder."""
    folders = {name: str(scratch) for name in ("TMPDIR", "LITDATA_CACHE_DIR")}
    return {**os.environ, **SETTINGS, **folders, "HF_HUB_OFFLINE": "1"}


@contextmanager
def running(specs: Sequence[ArmSpec], scratch: Path) -> Iterator[list[Arm]]:
    """Start all arms; at the end they see the end of their commands and leave."""
    with ExitStack() as stack:
        arms = []
        for number, spec in enumerate(specs):
            log = scratch / f"arm-{number}.log"
            errors = stack.enter_context(log.open("w", encoding="utf-8"))
            process = subprocess.Popen(
                spec.command,
                cwd=spec.folder,
                env=_environment(scratch),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            stack.callback(_end, process)
            arms.append(Arm(spec, process, log))
        for arm in arms:
            arm.facts = arm.read()
        yield arms


def _end(process: subprocess.Popen[str]) -> None:
    """Let it leave by itself: a killed one would leave shared memory behind."""
    assert process.stdin is not None
    try:
        process.stdin.close()
        process.wait(timeout=30)
    except (BrokenPipeError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
