"""The ladder for people."""

from __future__ import annotations

from typing import Any

from benchmarks.train_step.profile_table import print_profile
from benchmarks.train_step.table import rate
from shards.column import Json

HEADER = (
    f"{'rung':<34}{'batch':>6}{'img/s':>8}{'over the one before':>24}{'plain':>7}{'MFU':>7}"
    f"{'GiB':>7}{'setup s':>9}  {'verdict':<15}attention, checks"
)


def line(row: Json) -> str:
    """A row of the result document under `HEADER`."""
    start = f"{row['rung']:<34}{row['micro_batch']:>6}"
    if row["not_measured"]:
        verdict = "FAILED" if row["failed"] else "not measured"
        return f"{start}  {verdict}: {row['not_measured']}"
    over_plain = f"{row['over_plain']['median']:.2f}x" if "over_plain" in row else ""
    return (
        f"{start}{rate(row['images_per_sec']['median']):>8}{_ratio(row):>24}{over_plain:>7}"
        f"{row['mfu']['median']:>7.1%}{row['peak_mem_gib']:>7.1f}{row['setup_sec']:>9.1f}  "
        f"{row['verdict']:<15}{row['ran']}{_checks(row['checks'])}"
    )


def _ratio(row: Json) -> str:
    if "ratio" not in row:
        return ""
    ratio = row["ratio"]
    apart = "" if row["interleaved"] else "*"
    return f"{ratio['median']:.3f}x ({ratio['p10']:.3f}-{ratio['p90']:.3f}){apart}"


def _checks(checks: Json) -> str:
    found = [each for each in checks.get("same_function", ()) if "cosine" in each]
    if not found:
        return ""
    cosine = min(each["cosine"] for each in found)
    worst = max(each["worst_parameter_frac"] for each in found)
    short = checks["short_training"]["loss_frac"]
    return f"; cosine {cosine:.6f}, worst weight {worst:.1%}, short losses {short:.2%}"


def print_table(document: dict[str, Any]) -> None:
    """The result for people."""
    env, protocol = document["environment"], document["protocol"]
    num_blocks = protocol["blocks"] * protocol["rounds"]
    print(
        f"\n{document['variant']} on {env['device']}, torch {env['versions']['torch']}; medians "
        f"and p10-p90 over {num_blocks} blocks in turns with the rung before; data from the page "
        "cache"
    )
    print(HEADER)
    for row in document["rows"]:
        print(line(row))
    _print_notes(document)
    if final := document["final"]:
        ratio, apart = final["ratio"], not final["ratio"]["p10"] <= 1 <= final["ratio"]["p90"]
        print(
            f"\n{final['rung']}: {rate(final['images_per_sec']['median'])} img/s, "
            f"{ratio['median']:.2f}x (p10-p90 {ratio['p10']:.2f}-{ratio['p90']:.2f}) as fast as "
            f"the plain loop at its best ({final['before']}){'' if apart else ': not told apart'}"
        )
    if document["recommended_flags"]:
        print(f"recommended here: {' '.join(document['recommended_flags'])}")
    if document["profile"]:
        print_profile(document["profile"])


def _print_notes(document: dict[str, Any]) -> None:
    measured = [row for row in document["rows"] if not row["not_measured"]]
    peaks = sorted({row["matmul_flops_per_sec"] / 1e12 for row in measured})
    if peaks:
        shown = ", ".join(f"{peak:.3g}" for peak in peaks)
        print(f"MFU: of {shown} TFLOP/s in matrix products, measured in this run")
    if any(row["device"] == "cpu" for row in measured):
        print("GiB: of the whole process so far; a CPU's memory is not counted by row")
    if any(not row.get("interleaved", True) for row in measured):
        print("*: one after the other: both at once did not fit into memory")
    faster = [row["rung"] for row in measured if row["verdict"] == "faster"]
    if faster:
        print(f"faster than what stands, though none stands on it: {', '.join(faster)}")
    for row in measured:
        for note in row["plan"].get("notes", ()):
            print(f"{row['rung']}: {note}")
