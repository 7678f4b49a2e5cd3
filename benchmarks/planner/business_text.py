"""A business case in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.planner.words import count, figure, usd

_DAYS_PER_MONTH = 365.25 / 12

Json = Mapping[str, Any]


def describe_case(case: Json) -> Iterator[str]:
    """Sentence by sentence.

    Args:
        case: of `business.business_case`.
    """
    runs, gpus = count(case["runs"], "run"), count(case["num_gpus"], "GPU")
    yield (
        f"the planned job: {usd(case['job_usd'])} ({runs} offline on {gpus} at {case['plan']}, "
        "stage 1 and storage included)"
    )
    if "runs_within_budget" in case:
        enough = count(case["runs_within_budget"], "such run")
        yield f"the budget: {usd(case['budget_usd'])}, enough for {enough} from one cache"
    if "expected_gain_usd" in case:
        gain, before, after = (case[f"{n}_usd"] for n in ("expected_gain", "before", "after"))
        years = count(case["years"], "year")
        yield (
            f"expected gain, as given: {usd(gain)} in {years} ({usd(before)} a year without the "
            f"model, {usd(after)} with it)"
        )
        yield from (_worth(case, name) for name in ("job", "budget") if f"{name}_usd" in case)
    if "own_over_pretrained_usd" in case:
        yield _against_pretrained(case)


def _worth(case: Json, name: str) -> str:
    share, months = case[f"{name}_share_frac"], case[f"{name}_payback_months"]
    if share is None:
        return f"the {name} does not pay back: nothing is gained"
    return (
        f"the {name} is {figure(100 * share)}% of that gain: it pays if at least that share of it "
        f"comes true, and is paid back {_after(months)} if all of it does"
    )


def _after(months: float) -> str:
    if months >= 1:
        return f"after {months:.2g} months"
    days = months * _DAYS_PER_MONTH
    return f"after {days:.2g} days" if days >= 1 else "within a day"


def _against_pretrained(case: Json) -> str:
    more = case["own_over_pretrained_usd"]
    found = f"a pre-trained model as it is: {usd(case['pretrained_gain_usd'])} gained without a job"
    if more > 0:
        return f"{found}; a model of one's own brings {usd(more)} more, its job paid"
    return f"{found}; a model of one's own brings {usd(-more)} less, its job paid: do not train"
