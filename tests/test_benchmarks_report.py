from __future__ import annotations

import html
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_python
from PIL import Image

from benchmarks.report import report
from benchmarks.report.fields import Fields
from benchmarks.report.page import build_sections, render
from benchmarks.report.pictures import BUDGET_BYTES
from benchmarks.report.report import ReportConfig
from benchmarks.report.sources import Document, Sources
from shards.errors import UserError

Json = dict[str, Any]
HUGE = 10**400  # JSON has integers that no float can hold
HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.test/x>"


def spread(median: float, frac: float = 0.05) -> Json:
    return {"median": median, "p10": median * (1 - frac), "p90": median * (1 + frac)}


def document(theme: str, **figures: Any) -> Json:
    environment = {
        "command": f"python -m benchmarks {theme}",
        "date": "2026-11-22",
        "commit": "abc1234",
        "dirty": False,
        "hardware": "epyc-2cpu",
        "device": "AMD EPYC",
        "num_devices": 0,
        "gpu": {},
        "num_cpus": 2,
        "cpu": "AMD EPYC",
        "cpu_mhz": 2396.0,
        "memory_gib": 15.6,
        "load_average": 1.25,
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
    }
    protocol = {"blocks": 5, "steps": 10, "warmup": 5}
    head = {"format": 1, "theme": theme, "variant": "", "protocol": protocol}
    return {**head, "environment": environment, **figures}


def arm(images_per_sec: float, share: float, wait: float) -> Json:
    sec = [64 / images_per_sec * wobble for wobble in (0.95, 1.0, 1.02, 1.05, 0.99)]
    return {
        "images_per_sec": spread(images_per_sec),
        "iters_per_sec": spread(images_per_sec / 64),
        "sec_per_step": sec,
        "share_of_ceiling": spread(share, 0.03),
        "data_wait_frac": spread(wait, 0.5),
        "losses": [0.21734, 0.16625, 0.14711],
    }


def online_offline(**changes: Any) -> Json:
    totals = {
        epochs: {
            "offline_sec_per_image": number / 228 + 1 / 469,
            "online_sec_per_image": number / 143,
            "speedup": (number / 143) / (number / 228 + 1 / 469),
        }
        for epochs, number in (("1", 1), ("2", 2), ("3", 3), ("10", 10))
    }
    seconds = {"decode": 0.03, "vae": 0.11, "text": 0.06, "unet": 0.24, "optimizer": 0.02}
    components: Json = {
        name: {"sec_per_step": spread(sec), "samples": [sec]}
        for name, sec in {**seconds, "ema": 0.004}.items()
    }
    figures = {
        "blocks": {"blocks": 5, "warmup": 5, "steps": 8},
        "not_measured": {},
        "preset": "tiny",
        "resolution": 64,
        "global_batch_size": 64,
        "device": "cpu",
        "precision": "float32",
        "attention": "sdpa flash",
        "ema": True,
        "arms": {
            "resident": arm(236, 1.0, 0.0),
            "offline": arm(228, 0.966, 0.012),
            "online": arm(143, 0.606, 0.021),
            "ids": arm(187, 0.79, 0.012),
        },
        "offline_speedup": spread(1.637, 0.08),
        "flops_per_image": {"unet": 535986176, "vae": 146219008, "text": 99939840},
        "flops_predicted_speedup": 1.459,
        "components": components,
        "stage1_images_per_sec": 469.0,
        "totals": {"epochs": totals, "break_even_epochs": 0.817},
    }
    return document("online-offline", **{**figures, **changes})


def step_row(micro_batch: int, speed: float, reason: str | None = None, **case: Any) -> Json:
    settings = {"preset": "sd2-base-256", "micro_batch": micro_batch, "attention": "auto"}
    settings |= {"precision": "bf16-weights", "compile": "off", "ema": "on", "loop": "latentmill"}
    row = {**settings, **case, "not_measured": reason, "visits": []}
    if reason is None:
        row |= {
            "iters_per_sec": spread(speed / micro_batch),
            "images_per_sec": spread(speed),
            "mfu": spread(0.41),
            "data_wait_frac": spread(0.004),
            "peak_mem_gib": 31.25,
            "visits": [{"setup_sec": 21.5, "attention": "sdpa cudnn"}],
        }
    return row


def train_step() -> Json:
    rows = [
        *(step_row(batch, 410 * batch / (batch + 20)) for batch in (4, 8, 16, 32)),
        step_row(64, 0, "out of memory"),
        step_row(32, 265.5, ema="off"),
        step_row(32, 231, attention="flash"),
        step_row(32, 0, "xformers: is not installed", attention="xformers"),
        step_row(32, 190, precision="bf16"),
        step_row(32, 341, compile="full"),
        step_row(32, 151, loop="diffusers", precision="bf16"),
        step_row(32, 158, loop="diffusers+channels-last", precision="bf16"),
        step_row(32, 0, "xformers: is not installed", loop="diffusers+xformers"),
    ]
    comparison = {"preset": "sd2-base-256", "ema": "on", "speedup": spread(2.159), "samples": [2]}
    cost = {"preset": "sd2-base-256", "loop": "latentmill", "micro_batch": 32, "samples": [0.05]}
    cost |= {"ema_images_per_sec": spread(252), "no_ema_images_per_sec": spread(265.5)}
    return document(
        "train-step",
        rows=rows,
        comparisons=[comparison],
        ema_costs=[{**cost, "cost_frac": spread(0.0508)}],
        left_out=["sd2-base-256, batch 32, round 2"],
    )


def scaling() -> Json:
    rows = [
        {
            "num_processes": count,
            "images_per_sec": spread(speed),
            "efficiency": spread(speed / count / 120),
            "samples": [speed],
            "sharding": "none",
            "not_measured": None,
        }
        for count, speed in ((1, 120.0), (2, 217.0))
    ]
    rows.append({"num_processes": 4, "sharding": "zero2", "not_measured": "2 CPUs here"})
    predicted = {
        "assumptions": {
            "intra_node_bytes_per_sec": 4.5e11,
            "model": ["no latency", "no stragglers"],
        },
        "published": [{"source": "somebody", "num_devices": 64, "against": 8, "efficiency": 0.87}],
        "rows": [
            {
                "num_devices": count,
                "sharding": "none",
                "efficiency": frac,
                "efficiency_without_overlap": frac / 2,
                "sent_bytes_per_device": 3.4e9,
                "communication_sec": 0.0077,
            }
            for count, frac in ((8, 0.974), (64, 0.941), (512, 0.903))
        ],
    }
    return document("scaling", rows=rows, notes=["two CPUs"], predicted=predicted)


def loader() -> Json:
    def of(speed: float, kind: str, **facts: Any) -> Json:
        return {
            "kind": kind,
            "samples_per_sec": spread(speed),
            "bytes_per_sec": spread(223232 * speed),
            "cpu_us_per_sample": spread(1e6 / speed),
            "memcpy_frac": spread(speed / 61562),
            "calls_per_sample": 5.1,
            **facts,
        }

    arms = {
        "ours": of(31954.2, "ours", shuffle_distance=1.0),
        "ours: text": of(49404.0, "ours", shuffle_distance=1.0),
        "webdataset": of(4243.0, "peer", shuffle_distance=0.85, version="1.0.2"),
        "memcpy": of(61562.0, "memcpy"),
    }
    made = document(
        "loader",
        arms=arms,
        sample_bytes={"moments": 65536, "states": 157696},
        absent_peers=["litdata"],
        best_peer="webdataset",
        ours_over_best_peer=spread(7.53),
    )
    made["protocol"] |= {"num_samples": 4096, "batch_size": 32}
    return made


def precompute() -> Json:
    def arms(ours: float, naive: float) -> Json:
        return {
            name: {"images_per_sec": spread(speed), "images_per_core_sec": spread(speed / 2)}
            for name, speed in (("ours", ours), ("naive", naive))
        }

    null = {
        "arms": arms(187, 38),
        "ours_over_naive_per_core": spread(2.49),
        "paced": {"device_busy": spread(0.86), "device_over_cpu_speed": 0.7},
    }
    model = {
        "arms": arms(2.64, 2.06),
        "alone_sec": {"read, decode, transform": spread(0.36), "encode": spread(19.2)},
        "slowest_stage": "encode",
        "wall_over_slowest_alone": spread(0.953),
        "naive_over_ours_wall": spread(1.28),
        "flops": {"ours_per_row": 7.77e9, "naive_per_row": 8.68e9},
    }
    made = document("precompute", null_encoder=null, model=model)
    made["protocol"] |= {"model": "examples/tiny-model", "resolutions": "256,512"}
    return made


def order() -> Json:
    shuffle = [
        {
            "window": window,
            "steps_of_a_shard": spread(443.5),
            "epoch_frac_of_a_shard": spread(0.00227),
            "shards_in_a_batch": spread(64),
            "shards_open_per_rank": spread(8),
        }
        for window in (4096, 16384)
    ]
    made = document(
        "order",
        open_sec=spread(0.336),
        seek_sec=spread(0.0325),
        next_ms=spread(0.592),
        peak_rss_mb=spread(242.2, 0),
        manifest_bytes=20121167,
        shuffle=shuffle,
    )
    made["protocol"] |= {"num_samples": 400_000_000, "num_shards": 40_000}
    return made


def plan() -> Json:
    rows = [
        {"num_gpus": count, "train_days": days, "cost_usd": usd}
        for count, days, usd in ((8, 81.33, 31230.0), (128, 5.51, 33874.0))
    ]
    storage = {"latents_bytes": 2.6e13, "text_states_bytes": 6.3e13}
    return document("plan", rows=rows, storage=storage, break_even_epochs=0.6)


def env() -> Json:
    backends = {"flash": True, "cudnn": False, "xformers": "not installed"}
    return document("env", attention=backends, matmul_flops_per_sec=9.3e10, copy_bytes=[1, 2, 3])


THEMES: dict[str, tuple[Callable[[], Json], str]] = {
    # A figure of each that must be on the page, as people read it.
    "online-offline": (online_offline, "1.64x"),
    "train-step": (train_step, "266\N{NO-BREAK SPACE}img/s (252–279)"),
    "scaling": (scaling, "97.4%, predicted"),
    "loader": (loader, "32,000/s (30,400–33,600)"),
    "precompute": (precompute, "2.49x (2.37–2.61)"),
    "order": (order, "242\N{NO-BREAK SPACE}MB"),
    "plan": (plan, "$33,874"),
    "env": (env, "not installed"),
    "something-new": (lambda: document("something-new", sizes={"cache_gib": 3.5}), "3.50"),
}


def write_run(folder: Path, num_rows: int = 30, *, name: str = "run") -> Path:
    """A run with curves, two validations, a grid of samples and of its average, and scenes."""
    run = folder / name
    (run / "samples").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows: list[Json] = []
    for number in range(1, num_rows + 1):
        loss = 0.03 + 0.4 / number + 0.01 * rng.random()
        row = {"step": 100 * number, "train/loss": loss, "perf/images_per_sec": 150 + 9 * loss}
        rows.append({**row, "train/learning_rate": 1e-3 / number})
        if number in (num_rows // 2, num_rows):
            bins = {f"val/loss_t{t:03d}-{t + 99:03d}": 0.1 + t / 1e4 for t in range(0, 1000, 100)}
            rows.append({"step": 100 * number, "val/loss": 0.101, "val/ema_loss": 0.0987, **bins})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"unet": "tiny", "max_steps": 100 * num_rows, "learning_rate": 1e-3, "data": "d"}
    (run / "config.json").write_text(json.dumps({"settings": settings, "attention": "sdpa flash"}))
    for step in (1000, 100 * num_rows):
        for ending in ("", "-ema"):
            noise = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
            Image.fromarray(noise).save(run / "samples" / f"{step:06d}{ending}.png")
    scenes = {"accuracy": {"colour": 0.985, "relation": None}, "chance": {"colour": 0.14}}
    (run / "scene_accuracy.json").write_text(json.dumps({"num_images": 200, **scenes}))
    return run


class Folders:
    """A folder of results and one of runs, and the page they make."""

    def __init__(self, root: Path) -> None:
        self.results, self.runs, self.page = root / "results", root / "runs", root / "report.html"
        self.results.mkdir()
        self.runs.mkdir()

    def add(self, made: Json, name: str = "") -> None:
        (self.results / (name or f"{made['theme']}.json")).write_text(json.dumps(made))

    def make(self) -> str:
        out = str(self.page)
        report.run(ReportConfig(results=str(self.results), runs=str(self.runs), out=out))
        return self.page.read_text(encoding="utf-8")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and text outside raw documents."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text, self.raw = "", ""
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in ("pre", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("pre", "style"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw += data
        else:
            self.text += data

    def attributes(self, *names: str) -> list[str]:
        return [attrs[name] for _, attrs in self.elements for name in names if name in attrs]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with every theme and two runs."""
    folders = Folders(tmp_path_factory.mktemp("full"))
    for make, _ in THEMES.values():
        folders.add(make())
    write_run(folders.runs, name="first")
    write_run(folders.runs, name="second")
    return folders.make()


# What is on the page ------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", THEMES)
def test_every_theme_shows_its_figures(folders: Folders, theme: str) -> None:
    make, figure = THEMES[theme]
    folders.add(make())
    page = Page(folders.make())
    assert figure in page.text
    assert "results/" in page.text  # its provenance
    assert "not under" not in page.text


def test_a_figure_on_the_page_follows_the_json(folders: Folders) -> None:
    folders.add(online_offline(offline_speedup=spread(2.3456, 0.1)))
    page = Page(folders.make())
    assert "2.35x (2.11–2.58)" in page.text
    assert "1.64x" not in page.text


def test_several_devices_stand_side_by_side(folders: Folders) -> None:
    folders.add(online_offline())
    other = online_offline(preset="sd2-base-512", resolution=512)
    other["environment"] |= {"device": "NVIDIA H200", "num_devices": 8}
    folders.add(other, "other.json")
    page = Page(folders.make())
    assert "tiny at 64 px, batch 64: AMD EPYC, 2 CPUs" in page.text
    assert "sd2-base-512 at 512 px, batch 64: 8 x NVIDIA H200" in page.text


def test_presets_and_machines_stand_in_order_of_size(folders: Folders) -> None:
    sizes = {"sd2-base-256": 180e9, "tiny": 0.5e9}
    for number, (preset, hardware) in enumerate(
        itertools.product(sizes, ("h200", "epyc-2cpu")), start=1
    ):
        made = online_offline(preset=preset, variant=preset)
        made["flops_per_image"]["unet"] = sizes[preset]
        made["environment"] |= {"hardware": hardware, "device": hardware}
        folders.add(made, f"{number}.json")
    page = folders.make()
    titles = re.findall(r"<h3>(\S+) at .*: (\S+), 2 CPUs</h3>", page)
    once = [("tiny", "epyc-2cpu"), ("tiny", "h200")]
    once += [("sd2-base-256", "epyc-2cpu"), ("sd2-base-256", "h200")]
    assert titles == once * 3
    assert page.count('<div class="tiles">') == 4


def test_stage_1_that_never_pays_is_said(folders: Folders) -> None:
    made = online_offline()
    made["totals"]["break_even_epochs"] = None
    folders.add(made)
    assert "Break-even after epochs: never" in Page(folders.make()).text


def test_predictions_are_marked_in_words_and_in_form(folders: Folders) -> None:
    folders.add(scaling())
    text = folders.make()
    assert text.count('class="fill predicted"') == 3
    assert text.count('class="fill ours"') == 4
    assert Page(text).text.count("%, predicted") == 3


def test_rows_without_a_measurement_say_why(folders: Folders) -> None:
    folders.add(train_step())
    text = Page(folders.make()).text
    assert "not measured: out of memory" in text
    assert "not measured: xformers: is not installed" in text
    assert "Left out for lack of time: sd2-base-256, batch 32, round 2." in text
    folders.add(scaling())
    assert "not measured: 2 CPUs here" in Page(folders.make()).text


def test_what_rows_say_together_is_shown(folders: Folders) -> None:
    folders.add(train_step())
    text = Page(folders.make()).text
    assert "EMA on: latentmill over the plain diffusers loop, each at its best: 2.16x" in text
    assert "5.08% (4.83–5.33)" in text  # what EMA costs


def test_without_one_of_the_two_arms_there_is_no_ratio_and_the_reason_is_said(
    folders: Folders,
) -> None:
    made = online_offline(not_measured={"online": "its image shards are gone"})
    for path in (["arms", "online"], ["offline_speedup"], ["totals"], ["arms", "resident"]):
        _without(made, *path)
    folders.add(made)
    page = Page(folders.make())
    assert "encoder in the step: its image shards are gone." in page.text
    assert "187\N{NO-BREAK SPACE}img/s" in page.text
    assert "Break-even" not in page.text
    assert "not under" not in page.text


def test_a_loop_without_ema_is_not_compared_with_one_that_has_it(folders: Folders) -> None:
    made = train_step()
    made["rows"].append(step_row(32, 999, ema="off", precision="bf16"))
    folders.add(made)
    text = Page(folders.make()).text
    start = text.index("each loop at its fastest settings here, EMA on")
    assert "999" not in text[start : text.index("Images per second by micro-batch", start)]
    assert "settings here, EMA off" not in text


def test_each_loop_is_shown_at_its_fastest(folders: Folders) -> None:
    folders.add(train_step())
    text = Page(folders.make()).text
    start = text.index("each loop at its fastest")
    chart = text[start : text.index("Images per second by micro-batch", start)]
    assert "341\N{NO-BREAK SPACE}img/s" in chart
    assert "151\N{NO-BREAK SPACE}img/s" in chart
    assert "266\N{NO-BREAK SPACE}img/s" not in chart


def test_a_result_within_a_run_is_shown_as_well(folders: Folders) -> None:
    run = write_run(folders.runs)
    (run / "bench.json").write_text(json.dumps(online_offline()))
    assert "1.64x" in Page(folders.make()).text


def test_one_run_can_be_named_alone(folders: Folders) -> None:
    run = write_run(folders.runs, name="only")
    (run / "bench.json").write_text(json.dumps(online_offline()))
    folders.runs = run
    page = Page(folders.make())
    assert "held-out loss, EMA" in page.text
    assert "1.64x" in page.text
    assert "1 result, 1 run." in page.text


def test_the_samples_are_those_of_the_last_step(folders: Folders) -> None:
    run = write_run(folders.runs)
    for step in ("999999", "1000000"):  # in the order of names the first is the last
        Image.new("RGB", (8, 8)).save(run / "samples" / f"{step}.png")
    text = Page(folders.make()).text
    assert "Samples at step 1,000,000, raw weights" in text
    assert "999,999" not in text


def test_a_figure_that_is_not_finite_leaves_a_gap(folders: Folders) -> None:
    run = write_run(folders.runs)
    with (run / "metrics.jsonl").open("a") as file:
        row = {"step": 3100, "train/loss": None, "perf/images_per_sec": 140.0}
        file.write(json.dumps(row) + "\n")
    text = folders.make()
    assert "not finite" in Page(text).text
    assert "nan" not in "".join(re.findall(r' d="[^"]*"', text)).lower()


# What to doubt ------------------------------------------------------------------------------------

NOISY = "the machine was too noisy to conclude"


@pytest.mark.parametrize(
    ("ratio", "why"),
    [
        ({"median": 1.5, "p10": 0.9, "p90": 2.1}, "p10–p90 crosses 1"),
        ({"median": 1.9, "p10": 1.4, "p90": 2.2}, "p90 is more than 1.50 times p10"),
        ({"median": 0.7, "p10": 0.5, "p90": 0.9}, "p90 is more than 1.50 times p10"),
    ],
)
def test_a_ratio_whose_blocks_disagree_is_doubted_beside_it(
    folders: Folders, ratio: Json, why: str
) -> None:
    made = online_offline(offline_speedup=ratio)
    made["totals"]["break_even_epochs"] = None
    folders.add(made)
    text = Page(folders.make()).text
    tiles = text[text.index("offline over online") : text.index("Speed of offline training")]
    assert tiles.count(f"{NOISY} from this: {why}") == 2  # the ratio, and the break-even from it
    assert f"of the ratio that they come from, {NOISY}" in text[text.index("Total time with") :]


def test_other_ratios_are_doubted_as_well(folders: Folders) -> None:
    makers = (train_step(), loader(), precompute())
    makers[0]["comparisons"][0]["speedup"] = spread(1.0, 0.1)
    makers[1]["ours_over_best_peer"] = spread(7.53, 0.3)
    makers[2]["null_encoder"]["ours_over_naive_per_core"] = spread(1.05, 0.1)
    for made in makers:
        folders.add(made)
    text = Page(folders.make()).text
    for ratio in ("1.00x (0.900–1.10)", "7.53x (5.27–9.79)", "1.05x (0.945–1.16)"):
        assert f"{ratio}; {NOISY}" in text


def test_a_steady_ratio_is_not_doubted(full: str) -> None:
    text = Page(full).text
    assert NOISY not in text
    assert "above 100%" not in text
    assert "the parts sum to" not in text


def test_a_share_above_the_ceiling_is_called_noise(folders: Folders) -> None:
    made = online_offline()
    made["arms"]["offline"]["share_of_ceiling"] = spread(3.64)
    folders.add(made)
    text = Page(folders.make()).text
    assert text.count("above 100%: noise") == 2  # in the tile and at the bar


@pytest.mark.parametrize(
    ("step_sec", "share"), [(1.75, "(24.8%); the rest is"), (0.2, "(217%); they overlap")]
)
def test_parts_far_from_their_step_are_commented(
    folders: Folders, step_sec: float, share: str
) -> None:
    made = online_offline()
    made["arms"]["online"]["sec_per_step"] = [step_sec] * 5
    folders.add(made)
    text = Page(folders.make()).text
    said = "online, VAE and text encoder in the step: the parts sum to"
    assert text.count("the parts sum to") == text.count(said) == 1
    assert share in text


def test_totals_say_that_they_follow_from_medians(full: str) -> None:
    assert "These follow from medians, so they have no spread." in Page(full).text


def test_no_mixed_precision_is_called_float32(folders: Folders) -> None:
    folders.add(online_offline(precision="no"))
    made = train_step()
    made["rows"].append(step_row(32, 99, precision="no"))
    folders.add(made)
    settings = {"settings": {"mixed_precision": "no"}}
    (write_run(folders.runs) / "config.json").write_text(json.dumps(settings))
    text = Page(folders.make()).text
    assert "mixed precisionno (float32)" in text.replace("\n", "")
    assert "mixed precisionno (float32)" in text[text.index("Training runs on this") :]
    assert "precision no (float32)" in text
    assert not re.search(r"precision no(?! \(float32\))", text)


@pytest.mark.parametrize(("load", "shown"), [(1.25, "1.25"), (7.9, "7.90 (!) on 2 CPUs")])
def test_the_load_is_shown_and_marked_where_it_exceeds_the_cpus(
    folders: Folders, load: float, shown: str
) -> None:
    folders.add(_with_environment(env(), load_average=load))
    text = Page(folders.make()).text
    assert text.count(shown) == 2  # in the table, and with the document
    assert ("(!): more ran" in text) == (load > 2)


# Safe, self-contained, accessible -----------------------------------------------------------------


def test_nothing_that_others_wrote_becomes_markup(folders: Folders) -> None:
    made = loader()
    made["arms"][HOSTILE] = {**made["arms"]["webdataset"], "version": HOSTILE}
    made["environment"] |= {"device": HOSTILE, "command": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    made["protocol"][HOSTILE] = HOSTILE
    folders.add(made, "<script>alert(1)<b>.json")
    rows = [{HOSTILE: HOSTILE}]
    folders.add(document(HOSTILE, **{HOSTILE: HOSTILE, "rows": rows}), "theme.json")
    folders.add({**env(), "format": HOSTILE}, "<script>broken.json")
    folders.add({**train_step(), "left_out": [f"sd2-base-256, {HOSTILE}"]})
    run = write_run(folders.runs, name="<script>alert(2)<b>\"'")
    settings = {"unet": HOSTILE, HOSTILE: HOSTILE}
    (run / "config.json").write_text(json.dumps({"settings": settings, "attention": HOSTILE}))
    page = Page(folders.make())
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "b", "iframe", "object", "link"}
    assert all(source.startswith("data:image/") for source in page.attributes("src"))
    assert page.text.count(HOSTILE) > 10
    assert html.escape(HOSTILE)[:20] in folders.page.read_text()


def test_the_page_refers_to_nothing_outside(full: str) -> None:
    page = Page(full)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    references = page.attributes("href", "xlink:href", "src", "srcset", "action", "poster", "data")
    assert len(references) > 20
    assert [r for r in references if not r.startswith(("#", "data:image/jpeg;base64,"))] == []
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    styles = " ".join([page.raw, *page.attributes("style", "clip-path")])
    assert "@import" not in full
    assert set(re.findall(r"url\((.)", styles)) <= {"#"}


def test_what_is_referred_to_within_the_page_is_there_once(full: str) -> None:
    page = Page(full)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    wanted = [r[1:] for r in page.attributes("href", "xlink:href") if r.startswith("#")]
    wanted += re.findall(r"url\(#([^)]*)\)", full)
    assert len(wanted) > 20
    assert set(wanted) <= set(ids)


def test_headings_are_in_order(full: str) -> None:
    levels = [int(tag[1]) for tag, _ in Page(full).elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert {2, 3} <= set(levels)


def test_images_and_curves_say_what_they_show(full: str) -> None:
    page = Page(full)
    pictures = [attrs for tag, attrs in page.elements if tag == "img"]
    drawings = [attrs for _, attrs in page.elements if attrs.get("role") == "img"]
    assert len(pictures) == 4
    assert len(drawings) == 8
    assert all("grid of images" in attrs["alt"] for attrs in pictures)
    assert all(len(attrs["aria-label"]) > 20 for attrs in drawings)
    assert dict(page.elements)["html"]["lang"] == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: str) -> None:
    css = (Path(report.__file__).parent / "report.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in _root_rules(css))
    colours = light if scheme == "light" else {**light, **dark}
    pairs = [(ink, on) for ink in ("ink", "muted", "link") for on in ("page", "card")]
    pairs += [("on-colour", f"c{number}") for number in range(1, 8)]
    assert [pair for pair in pairs if _contrast(*(colours[name] for name in pair)) < 4.5] == []


def _root_rules(css: str) -> list[str]:
    return re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)[:2]


def _contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# What is broken, and what is large ----------------------------------------------------------------


def _without(made: Json, *path: str) -> Json:
    inner = made
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return made


def _with_environment(made: Json, **facts: Any) -> Json:
    return {**made, "environment": {**made["environment"], **facts}}


BROKEN_RESULTS = {
    "half": ('{"format": 1, "the', "cannot be read"),
    "list": ("[1, 2]", "is no benchmark's result"),
    "old": (json.dumps({**env(), "format": 0}), "format 0; wanted 1"),
    "odd-environment": (json.dumps({**env(), "environment": [1]}), "environment is a list"),
    "odd-theme": (json.dumps({**env(), "theme": {}}), "theme is an object"),
    "no-arm": (
        json.dumps(_without(online_offline(), "arms", "offline")),
        "arms.offline.share_of_ceiling is not there",
    ),
    "text-for-number": (
        json.dumps(online_offline(flops_predicted_speedup="fast")),
        "flops_predicted_speedup is a text; wanted a finite number",
    ),
    "infinite": (
        json.dumps(online_offline(flops_predicted_speedup=float("inf"))),
        "flops_predicted_speedup is inf",
    ),
    "huge": (
        json.dumps(online_offline(stage1_images_per_sec=HUGE)),
        "has an integer that is too large for a float",
    ),
    "huge-commit": (json.dumps(_with_environment(env(), commit=HUGE)), "too large for a float"),
    "brackets": ("[" * 100_000, "cannot be read"),
    "deep": ('{"a":' * 400 + "1" + "}" * 400, "is no benchmark's result"),
    "deep-protocol": (
        json.dumps({**env(), "protocol": {"a": json.loads("[" * 400 + "]" * 400)}}),
        "is nested more than 50 deep",
    ),
    "surrogate": (json.dumps({**env(), "note": "\ud800"}), "has a text that is no Unicode"),
    "surrogate-name": (json.dumps({**env(), "\udfff": 1}), "has a text that is no Unicode"),
    "odd-rows": (json.dumps({**train_step(), "rows": [3]}), "rows.0 is 3; wanted a JSON object"),
    "no-rows": (json.dumps({**train_step(), "rows": []}), "rows is empty"),
    "no-shuffle": (json.dumps(_without(order(), "shuffle")), "shuffle is not there; wanted a list"),
}


@pytest.mark.parametrize("name", BROKEN_RESULTS)
def test_a_broken_result_is_listed_and_the_rest_is_shown(folders: Folders, name: str) -> None:
    text, reason = BROKEN_RESULTS[name]
    (folders.results / f"{name}.json").write_text(text)
    folders.add(env())
    page = Page(folders.make())
    left_out = page.text[page.text.index("not shown, or not whole") :]
    assert f"{name}.json" in left_out
    assert reason in left_out
    assert "attention.xformers" in page.text


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """To all values, but of lists to the first alone: the others are alike."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for name, each in inner:
        yield (*path, name)
        if isinstance(each, dict | list):
            yield from _paths(each, (*path, name))


ODD_VALUES: tuple[Any, ...] = (None, [], {}, "odd", 3, [None], math.nan, HUGE)


@pytest.mark.parametrize("theme", THEMES)
def test_no_odd_value_anywhere_stops_the_page(theme: str) -> None:
    make, _ = THEMES[theme]
    paths = [path for path in _paths(make()) if path[0] not in ("format", "theme")]
    assert len(paths) > 15
    assert ("environment", "load_average") in paths
    for number, path in enumerate(paths):
        for odd in ODD_VALUES:
            made = make()
            inner: Any = made
            for name in path[:-1]:
                inner = inner[name]
            inner[path[-1]] = odd
            if not isinstance(made["environment"], dict):
                continue  # refused when it is read
            fields = Fields(made, "odd.json")
            found = Document(path=Path("odd.json"), theme=theme, fields=fields, text="{}")
            sources = Sources(documents=[found])
            sections = build_sections(sources)
            assert sections, path
            if number % 40 == 0 and odd == "odd":
                assert "<h2>Provenance" in render(sections, sources), path


@pytest.mark.parametrize("theme", THEMES)
def test_what_cannot_be_drawn_costs_its_own_card_alone(
    monkeypatch: pytest.MonkeyPatch, theme: str
) -> None:
    def fail(fields: Fields, *path: str) -> float:
        raise RecursionError("maximum recursion depth exceeded")

    make, _ = THEMES[theme]
    fields = Fields(make(), "odd.json")
    found = Document(path=Path("odd.json"), theme=theme, fields=fields, text="{}")
    monkeypatch.setattr(Fields, "number", fail)
    sources = Sources(documents=[found])
    assert "Provenance" in [section.title for section in build_sections(sources)]
    assert all("maximum recursion depth" in reason for _, reason in sources.left_out)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", json.dumps({"settings": {"unet": HUGE}})),
        ("config.json", "[" * 100_000),
        ("config.json", json.dumps({"settings": {"unet": "\ud800"}})),
        ("scene_accuracy.json", json.dumps({"num_images": HUGE})),
        ("metrics.jsonl", json.dumps({"step": 1, "train/loss": HUGE}) + "\n"),
        ("metrics.jsonl", "[" * 100_000 + "\n"),
    ],
)
def test_an_odd_file_of_a_run_costs_that_file_alone(folders: Folders, file: str, text: str) -> None:
    (write_run(folders.runs) / file).write_text(text)
    page = Page(folders.make())
    assert file in page.text[page.text.index("not shown, or not whole") :]
    assert "Samples at step 3,000, raw weights" in page.text


def test_a_name_that_is_no_unicode_does_not_stop_the_page(
    folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    folders.add(env(), "a\udcff.json")
    folders.add({**env(), "format": 7}, "b\udcff.json")
    assert "a?.json" in Page(folders.make()).text
    assert "b?.json: format 7" in capsys.readouterr().out


def test_a_broken_run_is_shown_as_far_as_it_goes(folders: Folders) -> None:
    run = write_run(folders.runs)
    (run / "config.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3100, "train/lo')
    sample = run / "samples" / "003000.png"
    sample.write_bytes(sample.read_bytes()[:2000])
    (run / "scene_accuracy.json").write_text("{")
    text = Page(folders.make()).text
    for reason in (
        "the run is shown without its settings",
        "its last line was cut short",
        "003000.pngcannot be read as an image",
        "scene_accuracy.json",
    ):
        assert reason in text.replace("\n", "")
    assert "training loss, last interval" in text
    assert "Samples at step 3,000, averaged weights" in text


def test_metrics_that_cannot_be_read_cost_the_curves_alone(folders: Folders) -> None:
    run = write_run(folders.runs)
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": "low"}\n')
    other = write_run(folders.runs, name="other")
    (other / "metrics.jsonl").write_text('nonsense\n{"step": 2}\n')
    (folders.runs / "no-run").mkdir()
    text = Page(folders.make()).text
    assert "line 1: train/loss is no number" in text
    assert "line 1 is not a row of figures" in text
    assert "no run: has neither metrics.jsonl nor config.json" in text
    assert "Samples at step 3,000, raw weights" in text


def test_a_folder_that_is_named_and_not_there_is_listed(folders: Folders) -> None:
    folders.add(env())
    folders.runs.rmdir()
    assert "no such folder" in Page(folders.make()).text


def test_without_runs_in_the_usual_place_nothing_is_left_out(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders.add(env())
    monkeypatch.chdir(folders.page.parent)
    folders.runs.rmdir()
    report.run(ReportConfig(results=str(folders.results)))
    assert "1 result, 0 runs, 0 left out" in capsys.readouterr().out
    assert "left out" not in folders.page.read_text(encoding="utf-8")


@pytest.mark.parametrize("out", ["", ".", "pipe"])
def test_an_out_that_is_no_file_is_refused_before_anything_is_read(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(folders.page.parent)
    os.mkfifo("pipe")
    monkeypatch.setattr(report, "find_sources", lambda *_: pytest.fail("was read"))
    with pytest.raises(UserError, match=r"--out: .*wanted a file"):
        report.run(ReportConfig(results=str(folders.results), out=out))
    assert Path("pipe").is_fifo()


def test_a_link_is_followed_and_stays(folders: Folders) -> None:
    folders.add(env())
    target = folders.page.with_name("target.html")
    folders.page.symlink_to(target)
    assert "matmul" in folders.make()
    assert folders.page.is_symlink()
    assert "matmul" in target.read_text(encoding="utf-8")


def test_with_nothing_to_show_the_error_says_what_makes_results(folders: Folders) -> None:
    folders.add({**env(), "format": 7})
    with pytest.raises(UserError, match=r"nothing that can be shown.*make bench.*make demo"):
        folders.make()
    assert not folders.page.exists()


def test_a_page_that_cannot_be_made_leaves_the_old_one(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.add(env())
    before = folders.make()

    def fail(path: Path, text: str) -> None:
        path.write_text(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shards.storage._write_text", fail)
    folders.add(order())
    with pytest.raises((UserError, OSError)):
        folders.make()
    assert folders.page.read_text(encoding="utf-8") == before


def test_many_large_pictures_stay_within_the_budget(folders: Folders) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1000, 3), dtype=np.uint8)
    for number in range(8):
        run = write_run(folders.runs, 2, name=f"run-{number}")
        (run / "metrics.jsonl").write_text('{"step": 1}\n')
        Image.fromarray(noise).save(run / "held_out.png", compress_level=0)
    sources = Page(folders.make()).attributes("src")
    assert len(sources) == 8 * 3
    assert sum(map(len, sources)) <= BUDGET_BYTES
    assert folders.page.stat().st_size < BUDGET_BYTES + 1_000_000


def test_long_runs_make_no_long_curves(folders: Folders) -> None:
    write_run(folders.runs, 20_000)
    assert len(folders.make()) < 400_000


def test_the_command_loads_nothing_heavy_before_it_runs() -> None:
    heavy = "{'torch', 'matplotlib', 'jinja2', 'PIL', 'diffusers'}"
    done = run_python(
        "-c", f"import sys, benchmarks.report.report; print({heavy} & set(sys.modules))"
    )
    assert done.stdout.strip() == "set()", done.stderr
