"""How much of the host's memory can still be taken."""

from __future__ import annotations

from pathlib import Path


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """What the kernel can give without swapping, within the limits of containers and batch jobs.

    Mapped files are given back when room is needed, so they count as available.

    Args:
        proc: where procfs is mounted.
        groups: where control groups (version 2) are mounted, if they are.
    """
    room = [1024 * _numbers(proc / "meminfo")["MemAvailable"]]
    for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
        hierarchy, _, name = line.split(":", 2)
        if hierarchy == "0":
            group = groups / name.lstrip("/")
            room += [_room_in(one) for one in (group, *group.parents) if _is_limited(one)]
    return min(room)


def _is_limited(group: Path) -> bool:
    limit = group / "memory.max"
    return limit.exists() and limit.read_text(encoding="utf-8").strip() != "max"


def _room_in(group: Path) -> int:
    limit, used = (int((group / f"memory.{of}").read_text()) for of in ("max", "current"))
    stat = _numbers(group / "memory.stat")
    return limit - used + stat["inactive_file"] + stat["active_file"]


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line by the line's first word."""
    lines = (line.replace(":", " ").split() for line in path.read_text("utf-8").splitlines())
    return {name: int(number) for name, number, *_ in lines}
