"""Our reader of latent shards against other people's loaders: same samples, shuffled, in turns.

Every arm is a process of its own that reads its own format at its own best settings without worker
processes, and delivers whole batches in memory. One arm works at a time, block by block. Before any
time is trusted every arm must have delivered the right bytes for every sample. All files are in the
page cache. memcpy of as many bytes, measured in turn with the rest, is the roof.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_arms import (
    PEERS,
    SETTINGS,
    Arm,
    ArmSpec,
    own_arms,
    peer_arm,
    peers_python,
    running,
    write_peer,
)
from benchmarks.loader_data import write_latent_dataset
from benchmarks.peers.samples import SAMPLE_BYTES, SHAPES, digest, draw_sample
from benchmarks.result import result, spread
from shards.errors import UserError

_CALLS_SKIP, _CALLS_COUNT = 8, 8  # batches


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Measure our reader of latent shards against webdataset, MDS and litdata."""

    num_samples: int = 4096
    """Samples, 223 kB each; every arm has a copy that must fit the page cache with the others'."""
    batch_size: int = 32
    """Samples per batch; divides the samples."""
    blocks: int = 15
    """Timed blocks for each arm; a block is one pass over the samples."""
    warmup: int = 8
    """Batches at the start of each block that are not timed; more than the reader runs ahead."""
    shards: int = 8
    """Shards in each arm's format, but for litdata's, whose chunks are its shuffle window."""
    peers: str = "all"
    """Comma-separated: webdataset, mds, litdata; or all; or none."""
    scratch: str = "data"
    """Folder for a temporary folder with every arm's copy; it is removed at the end."""
    out: str = ""
    """File of the result; default: its place in benchmarks/results; `-`: none."""


def measure(config: LoaderConfig) -> dict[str, Any]:
    """Run all arms and return the result document.

    Raises:
        UserError: settings that do not fit each other, or an arm that failed or delivered other
            bytes.
    """
    check_config(config)
    python = peers_python()
    wanted = choose_peers(config.peers)
    absent = [] if python else wanted
    if absent:
        print(f"not measured: {', '.join(absent)}; `make peers` installs them", flush=True)
    Path(config.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.scratch, prefix="loader-") as folder:
        scratch = Path(folder).resolve()
        check_space(scratch, config.num_samples * (1 + len(wanted) - len(absent)))
        specs = own_arms(scratch / "latents", config.num_samples, config.batch_size)
        print("writing the samples as latent shards", flush=True)
        write_latent_dataset(scratch / "latents", config.num_samples, config.shards)
        if python:
            specs[1:1] = [_write_copy(config, peer, python, scratch) for peer in wanted]
        with running(specs, scratch) as arms:
            found = _run_arms(config, arms)
    return result(
        "loader",
        config,
        sample_bytes=SAMPLE_BYTES,
        arm_environment=SETTINGS,
        arms=found,
        absent_peers=absent,
        **compare(found),
    )


def check_config(config: LoaderConfig) -> None:
    """Refuse settings that do not fit each other."""
    num_batches, rest = divmod(config.num_samples, config.batch_size)
    if rest or num_batches <= config.warmup:
        raise UserError(
            "--num-samples",
            f"{config.num_samples}",
            wanted=f"more than {config.warmup} whole batches of {config.batch_size}",
            remedy=f"--num-samples {max(num_batches, config.warmup + 1) * config.batch_size}",
        )
    if not 1 <= config.shards <= config.num_samples or config.blocks < 1:
        raise UserError("loader", "too few blocks, or more shards than samples")


def choose_peers(peers: str) -> list[str]:
    """The peers that `--peers` names."""
    if peers in ("all", "none"):
        return list(PEERS) if peers == "all" else []
    names = [name.strip() for name in peers.split(",")]
    if unknown := sorted(set(names) - set(PEERS)):
        raise UserError(
            "--peers", ", ".join(unknown), wanted=f"some of {', '.join(PEERS)}; or all; or none"
        )
    return names


def check_space(folder: Path, num_samples: int) -> None:
    """Refuse to fill the disk."""
    needed, free = num_samples * sum(SAMPLE_BYTES.values()), shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise UserError(
            "--scratch",
            f"{free / 1e9:.1f} GB free in {folder.parent}",
            wanted=f"{needed / 1e9:.1f} GB for all copies of the samples",
            remedy="another --scratch, or fewer --num-samples",
        )


def _write_copy(config: LoaderConfig, peer: str, python: Path, scratch: Path) -> ArmSpec:
    print(f"writing the samples for {peer}", flush=True)
    write_peer(
        peer,
        python,
        scratch / peer,
        num_samples=config.num_samples,
        samples_per_shard=-(-config.num_samples // config.shards),
    )
    return peer_arm(peer, python, scratch / peer, batch_size=config.batch_size)


def _run_arms(config: LoaderConfig, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """What was found for each arm, by name: facts, checks, and the seconds of every block."""
    num_batches = config.num_samples // config.batch_size
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        spec = arm.spec
        found[spec.name] = {"kind": spec.kind, "arrays": list(spec.arrays), **arm.facts}
        if spec.arrays:  # memcpy has no samples
            answer = arm.ask("digest", 0, num_batches)
            check_delivered(spec, answer["numbers"], answer["digests"], config.num_samples)
            found[spec.name]["shuffle_distance"] = shuffle_distance(
                answer["numbers"], config.num_samples
            )
    answers: dict[str, list[dict[str, Any]]] = {arm.spec.name: [] for arm in arms}
    for block in range(config.blocks):
        for arm in arms:
            answer = arm.ask("block", config.warmup, num_batches - config.warmup)
            answers[arm.spec.name].append(answer)
        speeds = (
            f"{name} {a[-1]['bytes'] / a[-1]['seconds'] / 1e9:.2f}" for name, a in answers.items()
        )
        print(f"block {block + 1}/{config.blocks}, GB/s: {', '.join(speeds)}", flush=True)
    roof = [answer["bytes"] / answer["seconds"] for answer in answers["memcpy"]]
    for arm in arms:
        counted = arm.ask("calls", _CALLS_SKIP, _CALLS_COUNT)
        found[arm.spec.name] |= summarise(answers[arm.spec.name], roof)
        found[arm.spec.name]["calls_per_sample"] = counted["calls"] / counted["samples"]
    return found


def check_delivered(
    spec: ArmSpec, numbers: Sequence[int], digests: Sequence[str], wanted: int
) -> None:
    """Hold what an arm delivered to what was written.

    Args:
        spec: the arm.
        numbers: of the samples, as the arm gave them.
        digests: of the samples' bytes.
        wanted: how many samples those batches should have held.

    Raises:
        UserError: other bytes, or another number of samples; no time is reported then.
    """
    if len(numbers) != wanted:
        raise UserError(
            f"loader arm {spec.name}", f"delivered {len(numbers)} samples", wanted=f"{wanted}"
        )
    for number, found in zip(numbers, digests, strict=True):
        if found != expected_digest(number, spec.arrays):
            raise UserError(
                f"loader arm {spec.name}", f"delivered other bytes than sample {number} has"
            )


@cache
def expected_digest(number: int, arrays: tuple[str, ...]) -> str:
    """Hash of a sample as it was written, over some of its arrays."""
    sample = draw_sample(number)
    return digest({name: sample[name] for name in SHAPES if name in arrays})


def shuffle_distance(numbers: Sequence[int], num_samples: int) -> float:
    """How far apart neighbours in a batch lie in the files; 1 when all was shuffled with all."""
    steps = np.abs(np.diff(np.asarray(numbers, dtype=np.float64)))
    return float(steps.mean() / (num_samples / 3))


def summarise(blocks: Sequence[dict[str, Any]], roof: Sequence[float]) -> dict[str, Any]:
    """Speeds over the blocks with their spread.

    Args:
        blocks: `seconds`, `cpu_seconds`, `samples` and `bytes` of each.
        roof: bytes per second of memcpy in the same rounds.
    """
    bytes_per_sec = [block["bytes"] / block["seconds"] for block in blocks]
    return {
        "samples_per_sec": spread([block["samples"] / block["seconds"] for block in blocks]),
        "bytes_per_sec": spread(bytes_per_sec),
        "cpu_us_per_sample": spread([1e6 * b["cpu_seconds"] / b["samples"] for b in blocks]),
        "memcpy_frac": spread([a / b for a, b in zip(bytes_per_sec, roof, strict=True)]),
        "sec_per_block": [block["seconds"] for block in blocks],
    }


def compare(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours against the peer with the best median, block by block."""
    peers = {name: arm for name, arm in arms.items() if arm["kind"] == "peer"}
    if not peers:
        return {"best_peer": None, "ours_over_best_peer": None}
    best = max(peers, key=lambda name: peers[name]["samples_per_sec"]["median"])
    seconds = zip(peers[best]["sec_per_block"], arms["ours"]["sec_per_block"], strict=True)
    return {
        "best_peer": best,
        "ours_over_best_peer": spread([theirs / ours for theirs, ours in seconds]),
    }


def print_table(document: dict[str, Any]) -> None:
    """The result for people."""
    env, protocol = document["environment"], document["protocol"]
    print(
        f"\n{protocol['num_samples']} samples of {sum(SAMPLE_BYTES.values()) / 1e3:.0f} kB, batch "
        f"{protocol['batch_size']}, {protocol['blocks']} blocks, {env['device']}, page cache"
    )
    print(f"{'':<13}{'samples/s':>10}{'p10-p90':>16}{'GB/s':>7}{'of memcpy':>11}", end="")
    print(f"{'CPU us':>8}{'calls':>7}  per sample{'shuffle':>9}")
    for name, arm in document["arms"].items():
        speed = arm["samples_per_sec"]
        print(
            f"{name:<13}{speed['median']:>10,.0f}"
            f"{speed['p10']:>9,.0f}-{speed['p90']:<6,.0f}"
            f"{arm['bytes_per_sec']['median'] / 1e9:>7.2f}{arm['memcpy_frac']['median']:>11.0%}"
            f"{arm['cpu_us_per_sample']['median']:>8.1f}{arm['calls_per_sample']:>7.1f}{'':<12}"
            + (f"{arm['shuffle_distance']:>9.2f}" if "shuffle_distance" in arm else "")
        )
    if document["best_peer"]:
        ratio = document["ours_over_best_peer"]
        print(
            f"ours is {ratio['median']:.2f}x as fast as {document['best_peer']} "
            f"(p10-p90 {ratio['p10']:.2f}-{ratio['p90']:.2f})"
        )
