"""The rows of the training step for people, and what they say together."""

from __future__ import annotations

from typing import Any

from benchmarks.train_step.profile_table import print_profile
from shards.column import Json

_DATA_WAIT_AIM = 0.02
HEADER = (
    f"{'preset':<15}{'loop':<25}{'batch':>5}  {'attention':<10}{'precision':<13}{'compile':<9}"
    f"{'EMA':<4}{'it/s':>8}{'img/s':>8}{'p10-p90':>16}{'MFU':>7}{'GiB':>7}{'data':>7}"
    f"{'setup s':>9}  ran"
)


def line(row: Json) -> str:
    """A row of the result document under `HEADER`."""
    case = (
        f"{row['preset']:<15}{row['loop']:<25}{row['micro_batch']:>5}  {row['attention']:<10}"
        f"{row['precision']:<13}{row['compile']:<9}{row['ema']:<4}"
    )
    if row["not_measured"]:
        return f"{case}  {row['not_measured']}"
    speed, last = row["images_per_sec"], row["visits"][-1]
    between = f"{rate(speed['p10'])}-{rate(speed['p90'])}"
    return (
        f"{case}{rate(row['iters_per_sec']['median']):>8}{rate(speed['median']):>8}{between:>16}"
        f"{row['mfu']['median']:>7.1%}{row['peak_mem_gib']:>7.1f}"
        f"{row['data_wait_frac']['median']:>7.1%}{last['setup_sec']:>9.1f}  "
        f"{last['attention']}{_switches(last['plan'])}"
    )


def _switches(plan: Json) -> str:
    """Those that the trainer has turned on: they depend on the device."""
    names = [name for name, value in plan.items() if value is True]
    return f"; {', '.join(names)}" if names else ""


def print_table(document: dict[str, Any]) -> None:
    """The result for people."""
    env, protocol = document["environment"], document["protocol"]
    print(
        f"\n{env['device']}, torch {env['versions']['torch']}; medians over blocks of "
        f"{protocol['steps']} steps, {protocol['blocks']} in each of up to {protocol['rounds']} "
        f"rounds; data from the page cache"
    )
    print(HEADER)
    for row in document["rows"]:
        print(line(row))
    _print_notes(document)
    _print_ema_costs(document["ema_costs"])
    _print_comparisons(document["comparisons"])
    for what in document["left_out"]:
        print(f"left out after {protocol['max_minutes']:g} minutes: {what}")
    if document["profile"]:
        print_profile(document["profile"])


def _print_notes(document: dict[str, Any]) -> None:
    """How the columns are to be read."""
    visits = [visit for row in document["rows"] for visit in row["visits"]]
    peaks = sorted({visit["matmul_flops_per_sec"] / 1e12 for visit in visits})
    if peaks:
        shown = ", ".join(f"{peak:.3g}" for peak in peaks)
        print(f"MFU: of {shown} TFLOP/s in matrix products, measured once for each precision")
    if any(visit["device"] == "cpu" for visit in visits):
        print("GiB: of the whole process so far; a CPU's memory is not counted by row")
    waits = [row["data_wait_frac"]["median"] for row in document["rows"] if row["visits"]]
    if waits:
        print(f"waiting for data: at most {max(waits):.1%} (aim: at most {_DATA_WAIT_AIM:.0%})")
    if differences := document["loss_difference_frac"]:
        print(
            "same weights, samples and draws, float32: the losses of the two loops differ by at "
            f"most {max(differences.values()):.1g} of the loss"
        )


def _print_ema_costs(costs: list[Json]) -> None:
    """Micro-batches with and without EMA: a table for each preset and way of computing."""
    shown = None
    for cost in costs:
        title = (
            f"{cost['preset']}, {cost['loop']}, attention {cost['attention']}, precision "
            f"{cost['precision']}, compile {cost['compile']}"
        )
        if title != shown:
            print(f"\nimages/s with and without EMA: {title}")
            print(f"{'batch':>6}{'EMA':>10}{'no EMA':>10}{'EMA costs':>11}  p10 to p90")
            shown = title
        share = cost["cost_frac"]
        print(
            f"{cost['micro_batch']:>6}{rate(cost['ema_images_per_sec']['median']):>10}"
            f"{rate(cost['no_ema_images_per_sec']['median']):>10}{share['median']:>11.1%}"
            f"  {share['p10']:.1%} to {share['p90']:.1%}"
        )


def _print_comparisons(comparisons: list[Json]) -> None:
    for found in comparisons:
        ratio = found["speedup"]
        told_apart = not ratio["p10"] <= 1 <= ratio["p90"]
        print(
            f"\n{found['preset']}, EMA {found['ema']}: latentmill at its best is "
            f"{ratio['median']:.2f}x (p10-p90 {ratio['p10']:.2f}-{ratio['p90']:.2f}) as fast as "
            f"the plain diffusers loop at its best{'' if told_apart else ': not told apart'}"
        )
        for loop in ("latentmill", "diffusers"):
            best = found[loop]
            print(
                f"{rate(best['images_per_sec']['median']):>8} img/s: {best['loop']}, batch "
                f"{best['micro_batch']}, {best['ran']}, precision {best['precision']}, compile "
                f"{best['compile']}"
            )


def rate(per_sec: float) -> str:
    """Of a laptop's large U-Net as of a GPU's tiny one."""
    return f"{per_sec:.1f}" if per_sec >= 10 else f"{per_sec:.3g}"
