import dataclasses
import json
import re

import pytest
import torch
from conftest import TINY_MODEL
from diffusers import UNet2DConditionModel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from shards.errors import UserError
from train.config import TrainConfig
from train.main import parse
from train.objective import Objective
from train.presets import PRESETS, preset
from train.unet import build_unet, load_unet_config

# mosaicml/diffusion, SD-2-base-256.yaml and SD-2-base-512.yaml
PUBLISHED_SD2 = {
    "unet": "sd2-base",
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "adam_betas": (0.9, 0.999),
    "global_batch_size": 2048,
    "warmup_steps": 10_000,
    "lr_schedule": "constant",
    "prediction_type": "epsilon",
    "min_snr_gamma": 0.0,
    "caption_drop_prob": 0.1,
    "adam_eps": 1e-8,
    "snr_shift": 1.0,
    "offset_noise": 0.0,
    "zero_terminal_snr": False,
}
PUBLISHED_PHASES = {
    "sd2-base-256": {"resolution": 256, "max_steps": 550_000, "ema_decay": 0.0},
    "sd2-base-512": {
        "resolution": 512,
        "max_steps": 850_000,
        "ema_decay": 0.9999,
        "ema_start_step": 800_000,
    },
}
PUBLISHED_OTHERS = {
    # The model card of stable-diffusion-v1-5, and CompVis' trainer for average and optimizer.
    "sd15-512": {
        "unet": "sd15",
        "resolution": 512,
        "max_steps": 595_000,
        "global_batch_size": 2048,
        "learning_rate": 1e-4,
        "warmup_steps": 10_000,
        "lr_schedule": "constant",
        "weight_decay": 0.01,
        "adam_betas": (0.9, 0.999),
        "caption_drop_prob": 0.1,
        "prediction_type": "epsilon",
        "ema_decay": 0.9999,
        "ema_start_step": 0,
    },
    # mlcommons/training, stable_diffusion, and the reference convergence points at batch 512.
    "mlperf-sd2-512": {
        "unet": "sd2-base",
        "resolution": 512,
        "global_batch_size": 512,
        "learning_rate": 1.25e-7 * 512,
        "warmup_steps": 1000,
        "lr_schedule": "constant",
        "weight_decay": 0.01,
        "adam_betas": (0.9, 0.999),
        "adam_eps": 1e-8,
        "prediction_type": "v_prediction",
        "min_snr_gamma": 0.0,
        "caption_drop_prob": 0.0,
        "ema_decay": 0.0,
        "max_grad_norm": 0.0,
    },
}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def parameters_of(name: str, latent_size: int) -> int:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            {**load_unet_config(name), "sample_size": latent_size}
        )
    return sum(parameter.numel() for parameter in unet.parameters())


@pytest.mark.parametrize("name", PUBLISHED_PHASES)
def test_the_sd2_presets_are_the_published_recipe(name):
    config = dataclasses.asdict(preset(name))
    published = PUBLISHED_SD2 | PUBLISHED_PHASES[name]
    assert {field: config[field] for field in published} == published


@pytest.mark.parametrize("name", PUBLISHED_OTHERS)
def test_the_other_presets_are_published_recipes(name):
    config = dataclasses.asdict(preset(name))
    published = PUBLISHED_OTHERS[name]
    found = {field: config[field] for field in published}
    assert found.pop("learning_rate") == pytest.approx(published["learning_rate"], rel=1e-12)
    assert found == {name: value for name, value in published.items() if name != "learning_rate"}


def test_mlperfs_slowest_reference_run_fits_into_the_preset():
    config = preset("mlperf-sd2-512")
    assert config.max_steps * config.global_batch_size == 3_072_000


@pytest.mark.parametrize("name", [*PUBLISHED_PHASES, *PUBLISHED_OTHERS])
def test_every_published_recipe_is_on_stable_diffusions_noise_schedule(name):
    scheduler = Objective(preset(name), torch.device("cpu")).scheduler_config()
    assert {field: scheduler[field] for field in SCHEDULE} == SCHEDULE
    assert scheduler["num_train_timesteps"] == 1000
    assert scheduler["prediction_type"] == preset(name).prediction_type


def test_no_preset_escapes_a_comparison_with_its_published_numbers():
    assert PRESETS.keys() == {"tiny"} | PUBLISHED_PHASES.keys() | PUBLISHED_OTHERS.keys()


def test_the_sd15_unet_has_the_published_number_of_parameters():
    assert parameters_of("sd15", 64) == 859_520_964
    assert load_unet_config("sd15")["cross_attention_dim"] == 768


CONTRADICTIONS = [
    ({"zero_terminal_snr": True}, "--zero-terminal-snr"),
    ({"zero_terminal_snr": True, "prediction_type": "flow"}, "--zero-terminal-snr"),
    ({"prediction_type": "flow", "min_snr_gamma": 5.0}, "--min-snr-gamma"),
    ({"sharding": "zero2", "compile": "full"}, "--compile regional"),
    ({"checkpoint_format": "sharded"}, "--sharding zero2"),
    ({"random_crop": True}, "--online"),
    ({"online": "x.tar", "follow": True}, "--follow"),
    ({"low_precision_norm": True, "mixed_precision": "no"}, "--low-precision-norm"),
]


@pytest.mark.parametrize(("settings", "named"), CONTRADICTIONS, ids=str)
def test_settings_that_contradict_each_other_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        TrainConfig(**settings)


@pytest.mark.parametrize("latent_size", [32, 64])
def test_the_sd2_unet_has_the_published_number_of_parameters(latent_size):
    assert parameters_of("sd2-base", latent_size) == 865_910_724


def test_the_sd2_unet_is_stable_diffusion_2_base():
    config = load_unet_config("sd2-base")
    assert config["block_out_channels"] == [320, 640, 1280, 1280]
    assert config["attention_head_dim"] == [5, 10, 20, 20]
    assert config["cross_attention_dim"] == 1024
    assert config["use_linear_projection"] is True


def test_the_tiny_preset_is_tiny():
    assert parameters_of("tiny", 8) < 5_000_000


def test_the_learning_rate_warms_up_linearly_then_stays():
    config = preset("sd2-base-256")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    warmup = LinearLR(optimizer, start_factor=1e-4, total_iters=9_999)
    for step in range(10_050):
        assert config.learning_rate_at(step) == pytest.approx(warmup.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        warmup.step()
    assert config.learning_rate_at(549_999) == 1e-4


def test_the_cosine_equals_torchs_own():
    config = TrainConfig(
        max_steps=300,
        warmup_steps=40,
        lr_schedule="cosine",
        learning_rate=3e-3,
        final_lr_frac=0.1,
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-3)
    cosine = CosineAnnealingLR(optimizer, T_max=260, eta_min=3e-4)
    for step in range(40, 300):
        assert config.learning_rate_at(step) == pytest.approx(cosine.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        cosine.step()
    assert config.learning_rate_at(39) == pytest.approx(3e-3)
    assert config.learning_rate_at(10_000) == pytest.approx(3e-4)


def test_a_run_without_warmup_starts_at_the_peak():
    assert TrainConfig(learning_rate=0.5).learning_rate_at(0) == 0.5


REJECTED = [
    ("max_steps", 0),
    ("global_batch_size", 0),
    ("micro_batch_size", -1),
    ("log_every", 0),
    ("checkpoint_every", 0),
    ("keep_checkpoints", 0),
    ("seed", -1),
    ("num_partitions", -8),
    ("shuffle_window", 0),
    ("resolution", 0),
    ("min_snr_gamma", -1.0),
    ("caption_drop_prob", 1.5),
    ("caption_drop_prob", float("nan")),
    ("learning_rate", -1e-4),
    ("learning_rate", float("nan")),
    ("learning_rate", float("inf")),
    ("warmup_steps", -1),
    ("final_lr_frac", 1.1),
    ("adam_betas", (0.9, 1.0)),
    ("adam_betas", (-0.1, 0.999)),
    ("weight_decay", -0.1),
    ("max_grad_norm", -1.0),
    ("ema_decay", 1.5),
    ("ema_start_step", -1),
    ("num_samples", -1),
    ("flip_prob", 1.1),
    ("snr_shift", 0.0),
    ("snr_shift", float("nan")),
    ("offset_noise", -0.1),
    ("adam_eps", -1e-8),
    ("ema_every", 0),
    ("keep_every", -1),
    ("validation_samples", -1),
    ("sample_every", -1),
    ("max_restarts", -1),
]


@pytest.mark.parametrize(("field", "value"), REJECTED)
def test_a_wrong_value_is_rejected_by_the_name_of_its_flag(field, value):
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')}"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-steps", "0"),
        ("--max-steps", "many"),
        ("--micro-batch-size", "-1"),
        ("--prediction-type", "noise"),
        ("--learning-rte", "1"),
    ],
)
def test_the_command_line_names_a_wrong_flag_and_ends_with_status_2(flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        parse(["tiny", f"{flag}={value}"])
    assert end.value.code == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_flags_change_a_preset_and_nothing_else(name):
    assert parse([name]) == PRESETS[name]
    changed = parse([name, "--max-steps", "7", "--adam-betas", "0.8", "0.9"])
    assert changed == dataclasses.replace(PRESETS[name], max_steps=7, adam_betas=(0.8, 0.9))


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'sd3'.*tiny, sd2-base-256, sd2-base-512"):
        preset("sd3")


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert re.search(rf"--{field.name.replace('_', '-')}[ ,\n]", text), field.name


def test_the_weights_follow_from_the_seed_and_leave_torchs_generator_alone():
    config = load_unet_config("tiny")
    before = torch.random.get_rng_state()
    first, again, other = (build_unet(config, 8, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    name = "conv_in.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"in_channels": 4}', "no json"])
def test_a_file_that_is_no_unet_configuration_is_refused(tmp_path, text):
    path = tmp_path / "unet.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path}: not a U-Net configuration"):
        load_unet_config(str(path))


def test_an_unknown_unet_is_refused_with_the_shipped_ones(tmp_path):
    for name in ("huge", str(tmp_path / "missing.json")):
        with pytest.raises(UserError, match=r"one of sd15, sd2-base, tiny, or a path"):
            load_unet_config(name)


def test_the_tiny_unet_fits_the_embedded_model_folder():
    theirs = json.loads((TINY_MODEL / "unet" / "config.json").read_text())
    text = json.loads((TINY_MODEL / "text_encoder" / "config.json").read_text())
    ours = load_unet_config("tiny")
    assert ours["cross_attention_dim"] == text["hidden_size"]
    assert {name: theirs[name] for name in ours if name in theirs} == ours
