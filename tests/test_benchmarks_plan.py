"""The planner: published bills come out of their inputs; what is predicted is marked so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import TINY_MODEL

from benchmarks.flops import text_flops, vae_flops
from benchmarks.model_configs import SD2_TEXT, SD2_VAE, SD15_TEXT
from benchmarks.planner.config import PlanConfig
from benchmarks.planner.model_flops import COUNTS, flops_at
from benchmarks.planner.plan import plan, run
from benchmarks.planner.stored_bytes import latent_bytes, per_sample
from precompute.model_folder import ModelFolder, find_model
from shards.column import TextColumn
from shards.errors import UserError
from shards.info import describe
from train.flops import unet_flops
from train.presets import PRESETS
from train.unet import load_unet_config

MOSAICML = PlanConfig(preset="mosaicml-a100")
OWN = PlanConfig(
    images=("4e6",),
    resolutions="256,512",
    epochs=("5",),
    gpus=(8,),
    images_per_sec=("256=740", "512=165"),
    usd_per_gpu_hour=("2.5",),
)


@pytest.fixture(scope="module")
def mosaicml():
    return plan(MOSAICML)


# What was published -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_gpus", "rate_256", "rate_512", "days", "usd"),
    [
        (8, 1100, 290, 81.33, 31_230),
        (16, 2180, 585, 40.42, 31_043),
        (32, 4080, 1195, 20.06, 30_805),
        (64, 8530, 2340, 10.14, 31_146),
        (128, 11_600, 4590, 5.51, 33_874),
    ],
)
def test_the_five_published_rows_come_out_of_their_inputs(
    mosaicml, num_gpus, rate_256, rate_512, days, usd
):
    row = next(row for row in mosaicml["training"] if row["num_gpus"] == num_gpus)
    rates = [phase["images_per_sec"] for phase in row["phases"]]
    assert rates == pytest.approx([rate_256, rate_512])
    assert round(row["days"], 2) == days
    assert row["usd"]["$2.00/h"] == pytest.approx(usd, abs=1)  # some of theirs are cut, not rounded
    seen = [phase["images_seen"] for phase in mosaicml["phases"]]
    assert seen == [1_126_400_000, 1_740_800_000]


def test_what_the_published_factor_leaves_out(mosaicml):
    stage_one, totals = mosaicml["stage_one"][0], mosaicml["totals"]
    assert stage_one["gpu_hours"] == 3784
    assert stage_one["usd"]["$2.00/h"] == pytest.approx(7600, rel=0.005)
    arms = totals["arms"]
    training = {arm: arms[arm]["training_gpu_hours"] for arm in arms}
    assert training["offline"] == pytest.approx(15_615, abs=1)
    assert training["online"] / training["offline"] == pytest.approx(1.4)
    assert arms["offline"]["gpu_hours"] == pytest.approx(19_399, abs=1)
    assert totals["gain"]["1"]["offline"] == pytest.approx(1.127, abs=0.0005)
    assert totals["break_even"]["offline"]["runs"] == pytest.approx(0.61, abs=0.005)


def test_scaling_is_that_of_the_published_rows(mosaicml):
    last = mosaicml["training"][-1]["phases"]
    assert [round(phase["efficiency"], 2) for phase in last] == [0.66, 0.99]


def test_one_job_at_two_prices():
    row = plan(PlanConfig(preset="anyscale-a100"))["training"][0]
    assert row["gpu_hours"] == pytest.approx(13_165)
    rounding = 13_165 * 0.005  # the prices are known to the cent
    assert row["usd"]["reserved"] == pytest.approx(39_511, abs=rounding)
    assert row["usd"]["on-demand"] == pytest.approx(67_405, abs=1)


def test_less_than_an_epoch_cannot_pay_on_equal_gpus():
    gain = plan(PlanConfig(preset="anyscale-a100"))["totals"]["gain"]
    assert 1 <= gain["1"]["offline"] < 1.01  # captions of both resolutions are encoded once
    assert gain["2"]["offline"] > 1.1
    one_size = replace(OWN, resolutions="512", epochs=("0.5",), images_per_sec=("512=165",))
    assert plan(one_size)["totals"]["gain"]["1"]["offline"] == pytest.approx(1.0)


# Bytes and FLOPs ----------------------------------------------------------------------------------


def test_bytes_of_a_sample_are_those_of_the_format(make_latent_dataset, tmp_path):
    dataset = make_latent_dataset(tmp_path / "latents", [40], captions_per_shard=40)
    columns = describe(dataset)["columns"].values()
    found = per_sample("tiny", [64])
    for column in columns:
        parts = column["bytes_per_sample_by_component"]
        of_file = {"headers", "index_checksum"}
        stored = sum(size for name, size in parts.items() if name not in of_file)
        planned = found["latents"]["moments"]["64"]
        assert stored == (planned if column["kind"] == "image" else found["text"]["fp16"])


def test_bytes_at_the_size_of_sd2():
    found = per_sample("sd2-base", [256, 512])
    assert found["latents"]["moments"] == {"256": 16_396, "512": 65_548}
    assert found["latents"]["mean-int8"] == {"256": 4_124, "512": 16_412}
    assert found["text"] == {"fp16": 157_862, "int8": 79_322, "ids": 166}


def test_stored_bytes_and_the_rate_of_reading_follow_from_the_choice():
    document = plan(replace(OWN, latents="mean", text="int8"))
    images = 4e6 * (8_204 + 32_780)
    stored = document["bytes"]["stored"]
    assert stored == {
        "offline": pytest.approx(images + 4e6 * 79_322),
        "ids": pytest.approx(images + 4e6 * 166),
    }
    small = document["feed"][0]["offline"]
    assert small["mb_per_sec_per_gpu"] == pytest.approx(740 * (8_204 + 79_322) / 1e6)
    assert small["mb_per_sec_per_node"] == pytest.approx(8 * small["mb_per_sec_per_gpu"])


@pytest.mark.parametrize(("unet", "resolution"), [("sd2-base", 384), ("sd15", 512), ("tiny", 192)])
def test_flops_of_the_unets_are_those_that_its_operators_count(unet, resolution):
    counted = unet_flops(load_unet_config(unet), resolution // 8, 77)
    assert flops_at(unet, resolution)["unet"] == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize(("unet", "text_config"), [("sd2-base", SD2_TEXT), ("sd15", SD15_TEXT)])
def test_flops_of_the_encoders_are_those_that_their_operators_count(tmp_path, unet, text_config):
    for part, config in (("vae", SD2_VAE), ("text_encoder", text_config)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    model = ModelFolder(name="sd", path=tmp_path)
    found = flops_at(unet, 384)
    assert found["vae"] == pytest.approx(vae_flops(model, 384), rel=1e-9)
    encoder = {"weights_sha256": "", "encoder_config": {}, "tokenizer_sha256": ""}
    column = TextColumn(
        **encoder,
        compute_dtype="",
        storage_dtype="none",
        num_tokens=77,
        dim=text_config["hidden_size"],
    )
    assert found["text"] == pytest.approx(text_flops(model, column), rel=1e-9)


def test_flops_of_the_tiny_model_are_counted_as_well():
    assert {preset.unet for preset in PRESETS.values()} == set(COUNTS)
    vae = vae_flops(find_model(str(TINY_MODEL)), 64)
    assert flops_at("tiny", 64)["vae"] == pytest.approx(vae, rel=1e-9)


# Arithmetic ---------------------------------------------------------------------------------------


def test_an_own_job_by_hand():
    document = plan(OWN)
    hours = 20e6 / (8 * 740) / 3600 + 20e6 / (8 * 165) / 3600
    row = document["training"][0]
    assert row["days"] == pytest.approx(hours / 24)
    assert row["usd"] == {"$2.50/h": pytest.approx(8 * hours * 2.5)}
    online, offline = (document["totals"]["arms"][arm] for arm in ("online", "offline"))
    encode = 4e6 * (0.58940 / 740 + 0.46359 / 165) / 3600  # captions once, with the first images
    assert offline["stage1_gpu_hours"] == pytest.approx(encode, rel=1e-4)
    assert online["stage1_gpu_hours"] == online["stored_bytes"] == 0
    longer = 20e6 * (0.58940 / 740 + 0.48233 / 165) / 3600  # in every step of both
    assert online["training_gpu_hours"] - offline["training_gpu_hours"] == pytest.approx(
        longer, rel=1e-4
    )


def test_at_the_break_even_both_ways_cost_the_same():
    config = replace(OWN, storage_usd_per_tb_month=23.0, egress_usd_per_tb=20.0)
    document = plan(config)
    point = document["totals"]["break_even"]["offline"]
    one, three = (plan(replace(config, runs=n))["totals"]["arms"] for n in (1, 3))

    def at(arm: str, pick, runs: float) -> float:
        per_run = (pick(three[arm]) - pick(one[arm])) / 2
        return pick(one[arm]) + (runs - 1) * per_run

    def gpu_hours(arm):
        return arm["gpu_hours"]

    def usd(arm):
        return arm["usd"]["$2.50/h"]["total"]

    for pick, runs in ((gpu_hours, point["runs"]), (usd, point["usd_runs"]["$2.50/h"])):
        assert at("online", pick, runs) == pytest.approx(at("offline", pick, runs))
    assert point["usd_runs"]["$2.50/h"] > point["runs"] > 0
    assert point["epochs"] == {"256": pytest.approx(5 * point["runs"]), "512": 5 * point["runs"]}


def test_a_cache_that_saves_nothing_never_pays():
    config = replace(OWN, online_factor=1.0, encode_images_per_sec=("1000",))
    document = plan(config)
    point = document["totals"]["break_even"]["offline"]
    assert point == {"runs": None, "epochs": None, "usd_runs": {"$2.50/h": None}}
    run(config)  # and can be printed


def test_storage_that_costs_more_than_it_saves_never_pays_in_dollars():
    document = plan(replace(OWN, storage_usd_per_tb_month=1e5))
    point = document["totals"]["break_even"]["offline"]
    assert point["usd_runs"]["$2.50/h"] is None
    assert point["runs"] is not None


def test_cheaper_gpus_encode_at_their_own_price_and_pace():
    document = plan(
        replace(
            OWN,
            encode_images_per_sec=("256=400", "512=100"),
            encode_usd_per_gpu_hour=0.5,
            encode_gpus=32,
        )
    )
    hours = 4e6 * (1 / 400 + 1 / 100) / 3600
    first, second = document["stage_one"]
    assert first["gpu_hours"] == pytest.approx(hours)
    assert first["days"] == pytest.approx(hours / 32 / 24)
    assert first["usd"]["$2.50/h"] == pytest.approx(hours * 0.5)
    assert second["kind"] == "predicted"
    assert document["totals"]["arms"]["offline"]["stage1_gpu_hours"] == pytest.approx(hours)


def test_images_too_small_for_a_resolution_are_neither_encoded_nor_stored():
    few = plan(replace(OWN, images=("256=4e6", "512=1e6")))
    images = 4e6 * 16_396 + 1e6 * latent_bytes("moments", 512, "sd2-base")
    assert few["bytes"]["stored"]["ids"] == pytest.approx(images + 4e6 * 166)
    assert [phase["images_seen"] for phase in few["phases"]] == [20e6, 5e6]


def test_without_a_price_there_are_gpu_hours_and_no_dollars(capsys):
    config = replace(OWN, usd_per_gpu_hour=())
    document = plan(config)
    assert document["training"][0]["usd"] == {}
    assert any("no dollars" in note for note in document["notes"])
    run(config)
    assert "$" not in capsys.readouterr().out


def test_the_captions_of_two_resolutions_are_encoded_once():
    flops = {side: flops_at("sd2-base", side) for side in (256, 512)}
    rates = tuple(f"{side}={1e13 / flops[side]['unet']}" for side in flops)
    both = plan(replace(OWN, images_per_sec=rates))["stage_one"][0]["gpu_hours"]
    work = flops[256]["vae"] + flops[512]["vae"] + flops[256]["text"]  # of an image
    assert both == pytest.approx(4e6 * work / 1e13 / 3600)
    few = replace(OWN, images_per_sec=rates, images=("256=1e6", "512=4e6"))
    work = 1e6 * flops[256]["vae"] + 4e6 * (flops[512]["vae"] + flops[512]["text"])
    assert plan(few)["stage_one"][0]["gpu_hours"] == pytest.approx(work / 1e13 / 3600)


# The business case --------------------------------------------------------------------------------


def test_budget_against_expected_return(mosaicml):
    config = replace(
        MOSAICML,
        budget_usd=5e6,
        return_before_usd=150e6,
        return_after_usd=200e6,
        return_pretrained_usd=180e6,
    )
    case = plan(config)["business_case"]
    usd = mosaicml["totals"]["arms"]["offline"]["usd"]["$2.00/h"]
    assert case["expected_gain_usd"] == 50e6
    assert case["budget_share_frac"] == pytest.approx(0.1)
    assert case["budget_payback_months"] == pytest.approx(1.2)
    assert case["job_usd"] == pytest.approx(usd["total"])
    assert case["job_share_frac"] == pytest.approx(usd["total"] / 50e6)
    assert case["own_over_pretrained_usd"] == pytest.approx(20e6 - usd["total"])
    runs = case["runs_within_budget"]
    assert usd["stage1"] + runs * usd["training"] <= 5e6
    assert usd["stage1"] + (runs + 1) * usd["training"] > 5e6


def test_a_return_that_does_not_grow_pays_nothing_back(capsys):
    run(replace(OWN, return_before_usd=2e6, return_after_usd=1e6, return_pretrained_usd=3e6))
    out = capsys.readouterr().out
    assert "does not pay back: nothing is gained" in out
    assert "do not train" in out
    assert "an input: nothing here predicts it" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"return_after_usd": 1e6}, "--return-before-usd and --return-after-usd"),
        ({"budget_usd": 1e6, "usd_per_gpu_hour": ()}, "no price of a GPU"),
    ],
)
def test_half_a_business_case_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        plan(replace(OWN, **changes))


# What is printed and drawn ------------------------------------------------------------------------


def test_the_json_is_the_last_line_and_the_whole_plan(capsys):
    run(replace(MOSAICML, json=True))
    *table, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert document["theme"] == "plan"
    assert document["format"] == 1
    assert document["protocol"]["gpus"] == [8, 16, 32, 64, 128]
    assert document["totals"]["gain"]["1"]["offline"] == pytest.approx(1.127, abs=0.0005)
    for figure in ("81.33", "$31,230", "5.51", "3,784", "1.127x", "61%"):
        assert any(figure in line for line in table), figure


def test_tables_of_two_phases_and_two_prices_fit_100_columns(capsys):
    run(
        replace(MOSAICML, usd_per_gpu_hour=("spot=2", "on-demand=4"), storage_usd_per_tb_month=23.0)
    )
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_every_prediction_is_marked_as_one(capsys):
    run(replace(OWN, images_per_sec=(), tflops=790.0, mfu=0.5))
    out = capsys.readouterr().out
    kinds = {entry["name"]: entry["kind"] for entry in plan(OWN)["inputs"]}
    assert kinds["img/s per GPU at 256 px, offline"] == "given"
    assert kinds["step time at 256 px, online over offline"] == "predicted"
    assert kinds["scaling efficiency beyond 1"] == "assumed"
    assert "732.4 of 1 [predicted: 539.31 GFLOPs an image at 50% of 790" in out
    assert "~" in out


def test_perfect_scaling_that_nobody_measured_is_marked_in_the_table(capsys):
    run(replace(OWN, gpus=(1, 1000)))
    lines = capsys.readouterr().out.splitlines()
    one, many = (next(line for line in lines if line.split()[:1] == [n]) for n in ("1", "1,000"))
    assert one.split()[3:5] == ["100%", "100%"]
    assert many.split()[3:5] == ["100%?", "100%?"]
    assert any("? assumed: nothing says what scaling costs" in line for line in lines)
    run(replace(OWN, gpus=(1, 1000), efficiency=0.97))
    assert "?" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
@pytest.mark.parametrize("gpus", [(8,), (8, 64)])
def test_the_plot_is_there_as_a_whole(tmp_path, name, gpus, capsys):
    run(replace(OWN, gpus=gpus, plot=str(tmp_path / name)))
    start = (tmp_path / name).read_bytes()[:100]
    assert start.startswith((b"\x89PNG", b"<?xml"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert name in capsys.readouterr().out
