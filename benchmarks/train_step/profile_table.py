"""The profile of a step for people."""

from __future__ import annotations

from shards.column import Json

_NAME_WIDTH = 70


def print_profile(profile: Json) -> None:
    """Kinds, the longest kernels, and what the device waited for."""
    what = "kernels" if profile["device"] == "cuda" else "operators"
    print(f"\n{profile['rung']}: {profile['ms_per_step']:.2f} ms of {what} a step")
    print(f"{'kind':<22}{'ms':>10}{'share':>8}{'calls':>9}")
    for row in profile["kinds"]:
        print(
            f"{row['kind']:<22}{row['ms_per_step']:>10.3f}{row['share_frac']:>8.1%}"
            f"{row['count_per_step']:>9.1f}"
        )
    print(f"\n{'ms':>10}{'share':>8}{'calls':>9}{'mean us':>10}  {'kind':<22}name")
    for row in profile["top"]:
        print(
            f"{row['ms_per_step']:>10.3f}{row['share_frac']:>8.1%}{row['count_per_step']:>9.1f}"
            f"{row['mean_us']:>10.1f}  {row['kind']:<22}{_short(row['name'])}"
        )
    if "timeline" in profile:
        _print_timeline(profile)


def _print_timeline(profile: Json) -> None:
    timeline, steps = profile["timeline"], profile["num_steps"]
    print(
        f"\nbusy {timeline['busy_frac']:.1%} of {timeline['span_ms'] / steps:.2f} ms a step; "
        f"{timeline['num_gaps']} gaps over 5 us in {steps} steps, {timeline['gaps_ms']:.2f} ms"
    )
    for gap in timeline["largest"]:
        print(f"{gap['us']:>10.1f} us after {_short(gap['after'])}, before {_short(gap['before'])}")
    launches = ", ".join(f"{name} {n:.0f}" for name, n in profile["launches_per_step"].items())
    print(f"the host puts on the device, a step: {launches or 'nothing that was seen'}")


def _short(name: str) -> str:
    """Templates make names of a page."""
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 1]}…"
