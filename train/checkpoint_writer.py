"""Writes a run's checkpoints while it trains on, and removes the old ones.

A local checkpoint is made in `000300.partial` and renamed. Behind a URL no folder can be renamed:
there the files go to their places and `state.json` makes them count. A kill at any moment leaves
nothing that counts, and what it does leave is removed before the next checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from threading import Event, Thread

from shards.canonical import canonical_json
from shards.errors import StorageError, UserError
from shards.retry import RetryPolicy, retried
from shards.storage import (
    TEMPORARY_SUFFIX,
    Location,
    list_files,
    read_bytes,
    remove,
    size_of,
    sync_folder,
    write_text_whole,
    write_whole,
)
from train.checkpoint import (
    STATE,
    Fill,
    Json,
    Snapshot,
    checkpoint_path,
    checkpoints_of,
    file_facts,
    pieces_name,
    state_text,
    step_folders,
)
from train.host_memory import available_bytes

_Failure = OSError | StorageError

_RETRY = RetryPolicy(attempts=4, first_delay_sec=5.0, factor=2.0)  # attempts: at the end
_MAX_PAUSE_SEC = 300.0
_MEMORY_SHARE = 0.8  # of what is free: readers and the page cache want some as well
_RECEIPTS_SEC, _POLL_SEC = 600.0, 0.5


class CheckpointWriter:
    """Writes the checkpoints of one run; each process that saves has its own.

    A snapshot that cannot be written is tried again with growing pauses, until a newer one takes
    its place; training goes on meanwhile, and the last good checkpoint stays.

    Of a sharded checkpoint every process writes its pieces and then a receipt; process 0 waits for
    all receipts, in its thread, and makes the checkpoint count. No thread communicates otherwise.
    So before each `save` process 0 calls `prepare`, and no process may save before that is done:
    a barrier between the two is the trainer's to put.

    Args:
        run: folder or URL.
        keep: how many of the newest checkpoints stay.
        keep_every: those of multiples of this many steps stay as well; 0: none.
        in_background: write a copy, where memory allows, while training goes on.
        say: gets a line for each thing that went wrong, or went well after all.

    Attributes:
        last_saved_step: of the newest checkpoint that this process has written; -1 before it has.
    """

    def __init__(
        self,
        run: Location,
        *,
        keep: int,
        keep_every: int,
        in_background: bool,
        say: Callable[[str], None],
    ) -> None:
        self.last_saved_step = -1
        self._run, self._keep, self._keep_every = run, keep, keep_every
        self._in_background, self._say = in_background, say
        self._said_no_room = False
        self._pinned_bytes = 0  # which torch keeps for the next copy
        self._prepared: tuple[int, _Failure | None] = (-1, None)
        self._snapshot: Snapshot | None = None  # a copy that is not written yet
        self._failure: _Failure | None = None  # of the newest snapshot
        self._crash: BaseException | None = None  # of the thread
        self._thread: Thread | None = None
        self._no_more_pauses, self._idle = Event(), Event()
        self._idle.set()

    def prepare(self, step: int) -> None:
        """Make way for a sharded checkpoint: wait for the one before, remove what kills left.

        A receipt that a killed process left would otherwise pass for that of a living one.
        """
        self._settle()
        try:
            _remove_leftovers(self._run)
        except (OSError, StorageError) as error:
            self._prepared = (step, error)
        else:
            self._prepared = (step, None)

    def save(self, snapshot: Snapshot) -> None:
        """Take a snapshot to write; waits until the one before is written, or has failed again.

        Raises:
            Exception: what else than a disk or network ended the thread of the one before.
        """
        self._settle()
        if self._snapshot is not None:
            self._say(f"checkpoint {self._snapshot.step} is given up for {snapshot.step}")
        self._snapshot = self._failure = None
        if snapshot.num_processes > 1 and snapshot.process == 0 and not self._is_prepared(snapshot):
            return
        has_room = self._has_room(snapshot)
        if not (self._in_background and has_room):
            self._try(snapshot, is_kept=has_room)
            if self._failure is None or not has_room:
                return
        self._snapshot = snapshot.to_host()
        self._pinned_bytes = snapshot.num_bytes if snapshot.is_on_gpu else 0
        self._idle.clear()
        self._thread = Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, final: bool = False) -> None:
        """Wait until nothing is being written.

        Args:
            final: there will be no newer snapshot: try a last few times what failed.

        Raises:
            UserError: final, and the newest snapshot is not written.
            Exception: what else than a disk or network ended the thread.
        """
        if not final:
            self._idle.wait()
            self._raise_crash()
            return
        self._settle()
        for attempt in range(1, _RETRY.attempts + 1):
            if self._snapshot is None:
                break
            if attempt > 1:
                time.sleep(_RETRY.delay_sec(attempt - 1))
            self._try(self._snapshot)
        if self._failure is not None:
            raise UserError(
                self._run,
                f"its last checkpoint could not be written ({self._failure})",
                remedy="free space or mend the storage, then the same command again: it continues "
                "from the checkpoint before",
            )

    def close(self) -> None:
        """Let the attempt under way end, and give up what could not be written."""
        self._settle()
        if self._snapshot is not None:
            self._say(f"warning: checkpoint {self._snapshot.step} was never written")
            self._snapshot = None

    def _is_prepared(self, snapshot: Snapshot) -> bool:
        step, self._failure = self._prepared
        assert step == snapshot.step, "prepare() comes first, then a barrier"
        if self._failure is not None:
            self._warn(snapshot, is_kept=False)
        return self._failure is None

    def _has_room(self, snapshot: Snapshot) -> bool:
        """Whether the host can hold a copy, and those of its other processes."""
        num_savers = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if snapshot.pieces else 1
        wanted = num_savers * snapshot.num_bytes
        found = available_bytes() + num_savers * self._pinned_bytes
        has_room = wanted <= _MEMORY_SHARE * found
        if self._in_background and not has_room and not self._said_no_room:
            self._said_no_room = True
            self._say(
                f"training waits while checkpoints are written: their copy would take "
                f"{wanted / 2**30:.1f} GiB, and {found / 2**30:.1f} GiB of memory are free"
            )
        return has_room

    # The thread ----------------------------------------------------------------------------------

    def _work(self) -> None:
        """Write the copy; after a failure pause and try again, until told not to."""
        pauses = (min(_RETRY.delay_sec(number), _MAX_PAUSE_SEC) for number in count(1))
        try:
            while self._snapshot is not None:
                if self._failure is not None:
                    self._idle.set()
                    if self._no_more_pauses.wait(next(pauses)):
                        return
                    self._idle.clear()
                self._try(self._snapshot)
        except BaseException as error:  # raised again by whoever waits
            self._crash = error
        finally:
            self._idle.set()

    def _settle(self) -> None:
        """Let the attempt under way end, and no other begin."""
        if self._thread is not None:
            self._no_more_pauses.set()
            self._thread.join()
            self._no_more_pauses.clear()
            self._thread = None
        self._raise_crash()

    def _raise_crash(self) -> None:
        if self._crash is not None:
            crash, self._crash, self._snapshot = self._crash, None, None
            raise crash

    # Writing -------------------------------------------------------------------------------------

    def _try(self, snapshot: Snapshot, *, is_kept: bool = True) -> None:
        """One attempt; `_failure` says how it went."""
        before, self._failure = self._failure, None
        try:
            _write(self._run, snapshot)
        except (OSError, StorageError) as error:
            self._failure = error
            _discard(self._run, snapshot)
            if before is None:
                self._warn(snapshot, is_kept=is_kept)
            return
        self._snapshot, self.last_saved_step = None, snapshot.step
        if before is not None:
            self._say(f"checkpoint {snapshot.step} is written after all")
        if snapshot.process == 0:
            self._remove_old()

    def _warn(self, snapshot: Snapshot, *, is_kept: bool) -> None:
        then = "and tries to write it again" if is_kept else "without it"
        self._say(
            f"warning: checkpoint {snapshot.step} is not written ({self._failure}). "
            f"Training goes on {then}; older checkpoints stay"
        )

    def _remove_old(self) -> None:
        try:
            for old in checkpoints_of(self._run)[: -self._keep]:
                if not (self._keep_every and int(old.path.name) % self._keep_every == 0):
                    _remove_checkpoint(old.path)
        except (OSError, StorageError) as error:  # the next checkpoint tries again
            self._say(f"warning: an old checkpoint is not removed ({error})")


def _write(run: Location, snapshot: Snapshot) -> None:
    """Write what this process has of a checkpoint; process 0 makes it count."""
    final = checkpoint_path(run, snapshot.step)
    if size_of(final / STATE) is not None:
        return  # a step's checkpoint is the same whenever it is written
    if snapshot.num_processes == 1:
        _remove_leftovers(run)
    staging = _staging(final) if isinstance(final, Path) else final
    files = {name: _write_file(staging / name, fill) for name, fill in snapshot.files().items()}
    if snapshot.process > 0:
        receipt = _receipt_name(snapshot.process, snapshot.num_processes)
        write_text_whole(staging / receipt, canonical_json(files))
        return
    files |= _await_receipts(staging, snapshot.num_processes)
    write_text_whole(staging / STATE, state_text(snapshot, files))
    if isinstance(final, Path):
        _staging(final).replace(final)
        sync_folder(final.parent)


def _write_file(where: Location, fill: Fill) -> Json:
    facts: Json = {}

    def fill_and_measure(path: Path) -> None:
        fill(path)
        facts.update(file_facts(path))

    write_whole(where, fill_and_measure)
    return facts


def _await_receipts(staging: Location, num_processes: int) -> dict[str, Json]:
    """The files of all other processes, once they have written them.

    Raises:
        StorageError: some have not, a good while after this process has.
    """
    wanted = {_receipt_name(process, num_processes) for process in range(1, num_processes)}
    deadline = time.monotonic() + _RECEIPTS_SEC
    while missing := wanted - list_files(staging).keys():
        if time.monotonic() > deadline:
            raise StorageError(
                staging,
                f"no {', '.join(sorted(missing))} after {_RECEIPTS_SEC:.0f} s",
                wanted="a receipt from every process",
                remedy="see what those processes say about their storage",
            )
        time.sleep(_POLL_SEC)
    files: dict[str, Json] = {}
    for name in sorted(wanted):
        files |= json.loads(read_bytes(staging / name))
    return files


def _receipt_name(process: int, num_processes: int) -> str:
    return f"{pieces_name(process, num_processes)}.json"


def _discard(run: Location, snapshot: Snapshot) -> None:
    """After a failure give the disk back what this process has taken of it."""
    final = checkpoint_path(run, snapshot.step)
    if isinstance(final, Path):
        with suppress(OSError):  # the next attempt overwrites what stays
            for name in snapshot.files():
                (_staging(final) / name).unlink(missing_ok=True)


# Removing -----------------------------------------------------------------------------------------


def _staging(final: Path) -> Path:
    """Where a local checkpoint is made, and where it is while it is removed."""
    return final.with_name(final.name + TEMPORARY_SUFFIX)


def _remove_leftovers(run: Location) -> None:
    """Remove what does not count."""
    if isinstance(run, Path):
        for folder in step_folders(run, TEMPORARY_SUFFIX):
            _remove_folder(folder)
        return
    for folder in step_folders(run):
        if size_of(folder / STATE) is None:
            _remove_folder(folder)


def _remove_checkpoint(folder: Location) -> None:
    """Never in sight half removed."""
    if isinstance(folder, Path):
        _remove_folder(folder.replace(_staging(folder)))
    else:
        remove(folder / STATE)
        _remove_folder(folder)


def _remove_folder(folder: Location) -> None:
    if isinstance(folder, Path):
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
        return
    with suppress(FileNotFoundError):
        retried(lambda: folder.fs.rm(folder.path, recursive=True), where=folder, action="deleting")
