"""The result of the latency benchmark for people."""

from __future__ import annotations

from typing import Any

from benchmarks.latency.timing import PARTS
from shards.column import Json

_HEADER = (
    f"{'arm':<36}{'batch':>5}{'median s':>10}{'p95 s':>9}{'n':>4}{'speed-up':>10}"
    f"{'text ms':>9}{'U-Net ms':>10}{'VAE ms':>8}{'PNG ms':>8}  difference"
)


def print_table(document: dict[str, Any]) -> None:
    """Timings, then counts, then what they do not say."""
    env, protocol = document["environment"], document["protocol"]
    if document["rows"]:
        print(
            f"\n{env['device']}, torch {env['versions']['torch']}, diffusers "
            f"{env['versions']['diffusers']}: {protocol['steps']} steps of "
            f"{protocol['scheduler']}, guidance {protocol['guidance']:g}; seconds a call, prompt "
            f"to pixels on the host"
        )
        print(_HEADER)
        print(*map(_line, document["rows"]), sep="\n")
    if reason := document.get("not_measured"):
        print(f"\nnot measured: {reason}")
    _print_counts(document["counts"])
    if document["note"]:
        print(f"\n{document['note']}")


def _line(row: Json) -> str:
    start = f"{row['arm']:<36}{row['batch_size']:>5}"
    if reason := row.get("not_measured"):
        return f"{start}  {reason}"
    speedup, parts = row.get("speedup", {}).get("median"), row["parts"]
    cells = "".join(
        f"{1000 * parts[name]['median']:>{width}.1f}"
        for name, width in zip(PARTS, (9, 10, 8, 8), strict=True)
    )
    return (
        f"{start}{row['call_sec']['median']:>10.4f}{row['p95_sec']:>9.4f}"
        f"{len(row['samples_sec']):>4}{f'{speedup:.2f}x' if speedup else '':>10}{cells}  "
        f"{_difference(row.get('image_diff'))}"
    )


def _difference(found: Json | None) -> str:
    if found is None:
        return ""
    if found["psnr_db"] is None:
        return f"equal to {found['reference']}"
    return (
        f"max {found['max_levels']}, mean {found['mean_levels']:.2f} of 255, "
        f"{found['psnr_db']:.1f} dB from {found['reference']}"
    )


def _print_counts(counts: Json) -> None:
    flops = counts["flops"]
    print(
        f"\ncounted for one image: text encoder {flops['text'] / 1e9:,.1f}, U-Net "
        f"{flops['unet_step'] / 1e9:,.1f} a step, VAE {flops['vae'] / 1e9:,.1f} GFLOP"
    )
    print(
        f"{'a denoising step':<28}{'U-Net operators':>17}{'U-Net GB':>10}{'around it':>11}"
        f"{'launches':>10}{'waits a step':>14}{'waits an image':>16}"
    )
    for row in counts["step"]:
        print(
            f"{row['name']:<28}{row['unet_operators']:>17,}{row['unet_gb']:>10.3f}"
            f"{row['operators_around']:>11}{row['launches_by_the_host']:>10,}"
            f"{row['waits_per_step']:>14g}{row['waits_per_image']:>16,}"
        )
