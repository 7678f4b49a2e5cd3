"""The whole path on scenes it draws itself: from nothing to a grid of images, in minutes.

    make demo                 # about 4 minutes of training
    make demo MINUTES=20      # a longer training, with a larger batch

Every stage is a command that works just so on real data; each is printed before it runs. The same
command again continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODEL = "examples/tiny-model"
SCENES, LATENTS = "data/demo/scenes", "data/demo/latents"
NUM_TRAIN, NUM_HELD_OUT, NUM_SAMPLED = 6000, 600, 200
DEFAULT_MINUTES = 4.0
# From here on a larger batch and a slower average make better use of the time.
LONG_MINUTES = 10.0


def run_stage(title: str, command: str) -> str:
    """Show a command, run it, pass its output on, and return its last line."""
    print(f"\n== {title}\n$ {command}", flush=True)
    start = time.monotonic()
    last = ""
    program, *arguments = shlex.split(command)
    program = str(Path(sys.executable).parent / program)
    with subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.rstrip() or last
            if not line.startswith("{"):  # the JSON at the end is for this script
                print(f"  {line}", end="", flush=True)
    if process.returncode:
        print(f"demo: stage {title!r} failed (exit status {process.returncode})", file=sys.stderr)
        sys.exit(process.returncode)
    print(f"  [{time.monotonic() - start:.0f} s]", flush=True)
    return last


def main(argv: list[str] | None = None) -> None:
    """Run the stages and close with an account."""
    parser = argparse.ArgumentParser(
        prog="make demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="of training")
    minutes = parser.parse_args(argv).minutes
    if minutes <= 0:
        parser.error("--minutes must be positive")
    start = time.monotonic()
    run = Path("runs/demo" if minutes == DEFAULT_MINUTES else f"runs/demo-{minutes:g}min")
    batch_size, ema_decay = (64, 0.998) if minutes >= LONG_MINUTES else (32, 0.995)
    draw_and_encode()
    bench = measure_speed(run, batch_size)
    steps = round(minutes * 60 * bench["arms"]["offline"]["iters_per_sec"]["median"])
    train(run, max(steps, 50), batch_size, ema_decay)
    scenes = measure_scenes(run)
    print_account(run, bench, scenes, time.monotonic() - start)


def draw_and_encode() -> None:
    """Scenes, then stage 1."""
    run_stage(
        "draw captioned scenes as image shards",
        f"python -m examples.scenes --out {SCENES} "
        f"--num-train {NUM_TRAIN} --num-held-out {NUM_HELD_OUT}",
    )
    run_stage(
        "stage 1: encode them once",
        f"python -m precompute --shards '{SCENES}/train/*.tar' --out {LATENTS} "
        f"--model {MODEL} --resolutions 64",
    )


def measure_speed(run: Path, batch_size: int) -> dict[str, Any]:
    """Online against offline; its speed also fixes how many steps fit into the minutes.

    The result is kept in the run's folder: a continued run must end at the step it set out for.
    """
    path = run / "bench.json"
    if not path.exists():
        run_stage(
            "bench: online against offline training",
            f"python -m benchmarks --data {LATENTS} --preset tiny "
            f"--global-batch-size {batch_size} --arms offline online --steps 10 --out {path}",
        )
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def train(run: Path, steps: int, batch_size: int, ema_decay: float) -> None:
    """Stage 2, on all CPUs where there is no GPU: left alone, the launcher takes one thread."""
    run_stage(
        "stage 2: train from latents alone",
        f"accelerate launch --num_cpu_threads_per_process {os.cpu_count() or 1} train/main.py "
        f"tiny --data {LATENTS} --output-dir {run} "
        f"--max-steps {steps} --global-batch-size {batch_size} --ema-decay {ema_decay} "
        f"--log-every 200 --model {MODEL}",
    )


def measure_scenes(run: Path) -> dict[str, Any]:
    """Do pictures of combinations that were never trained on show what they should?"""
    line = run_stage(
        "measure: held-out combinations, read back from the pixels",
        f"python -m evaluate scenes --run {run} --scenes {SCENES}/held_out "
        f"--num-images {NUM_SAMPLED} --model {MODEL}",
    )
    result: dict[str, Any] = json.loads(line)
    return result


def print_account(
    run: Path, bench: dict[str, Any], scenes: dict[str, Any], elapsed_sec: float
) -> None:
    """What ran, how fast, how well, and where to look."""
    shutil.copyfile(scenes["grid"], run / "grid.png")
    right, chance = scenes["accuracy"], scenes["chance"]
    offline, online = (bench["arms"][arm]["images_per_sec"] for arm in ("offline", "online"))
    parts = [part for part in ("background", "colour", "shape", "size") if part in right]
    print("\n== account")
    print(f"  time          {elapsed_sec / 60:.1f} minutes, set-up not counted")
    print(
        f"  stage 1       {NUM_TRAIN:,} images, {bench['stage1_receipts_images_per_sec']:.0f} img/s"
    )
    print(
        f"  stage 2       offline {offline['median']:.0f} img/s, online "
        f"{online['median']:.0f} img/s: {bench['offline_speedup']['median']:.2f}x"
    )
    print("  held out      " + ", ".join(f"{part} {right[part]:.0%}" for part in parts))
    print("  (by chance)   " + ", ".join(f"{part} {chance[part]:.0%}" for part in parts))
    print(
        f"  all right     {right['all_right']:.1%} of {scenes['num_images']} images of "
        f"combinations that were never trained on (chance {chance['all_right']:.0%})"
    )
    print(f"  pictures      {run}/grid.png (held out), {run}/samples.png (training captions)")


if __name__ == "__main__":
    main()
