"""Training from every way to store latents and captions; the text encoder beside token ids."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL
from helpers_train import (
    assert_same_runs,
    contents_of,
    error_line,
    flags,
    metrics_of,
    reader_of,
    write_unet,
)

from precompute.config import PrecomputeConfig
from precompute.encoded_text import EncodedText
from precompute.job import precompute
from shards.column import TextColumn
from shards.dataset import Column, Dataset
from shards.errors import DatasetError
from shards.quantize import (
    channel_scale,
    latents_of,
    quantize_latents,
    quantize_states,
    states_of,
)
from train.config import TrainConfig
from train.main import main
from train.objective import sample_latents
from train.transfer import to_device

CPU = torch.device("cpu")
LATENTS = {
    **{"moments": "moments-64", "mean": "mean-64"},
    **{"moments-int8": "moments-64-int8", "mean-int8": "mean-64-int8"},
}
TEXTS = {"fp16": "text", "int8": "text-int8", "ids": "text-ids"}


def precomputed(out: Path, images: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {"model": str(TINY_MODEL), "resolutions": "64", "device": "cpu"}
    settings |= {"shards": f"{images}/{{00000..00001}}.tar", "out": str(out)}
    precompute(PrecomputeConfig(**settings | options))
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, image_shards: Path) -> Path:
    """All variants in one dataset."""
    out = tmp_path_factory.mktemp("all") / "latents"
    for latents, text in zip(LATENTS, ("fp16", "int8", "ids", "ids"), strict=True):
        precomputed(out, image_shards, latents=latents, text=text)
    return out


@pytest.fixture(scope="module")
def ids_only(tmp_path_factory: pytest.TempPathFactory, image_shards: Path) -> Path:
    """The fewest bytes: int8 means and token ids."""
    out = tmp_path_factory.mktemp("ids") / "latents"
    return precomputed(out, image_shards, latents="mean-int8", text="ids")


def id_of(data: Path, name: str) -> str:
    """The id of a column by the human half of it."""
    (found,) = [one for one, c in Dataset(data).columns.items() if c.spec.name == name]
    return found


def chosen(data: Path, latents: str, text: str) -> dict[str, str]:
    columns = {"image_column": LATENTS[latents], "text_column": TEXTS[text]}
    return {option: id_of(data, name) for option, name in columns.items()}


def argv_for(folder: Path, data: Path, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        "unet": write_unet(folder / "unet.json", cross_attention_dim=128),
        "data": data,
        "output_dir": folder / "run",
        "global_batch_size": 8,
        "max_steps": 3,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "log_every": 1,
        "caption_drop_prob": 0.3,
        "num_samples": 0,
        "validation_samples": 0,
    }
    return ["tiny", *flags(**(settings | changes))]


def run(folder: Path, data: Path, **changes: Any) -> list[float]:
    """Train to the end; the loss of each step."""
    main(argv_for(folder, data, **changes))
    return [row["train/loss"] for row in metrics_of(folder / "run")]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[tuple[str, str], Any]:
    """The losses of three steps from every variant."""
    pairs = [*((latents, "fp16") for latents in LATENTS), ("moments", "int8"), ("moments", "ids")]
    return {
        (latents, text): run(
            tmp_path_factory.mktemp(f"{latents}-{text}"), data, **chosen(data, latents, text)
        )
        for latents, text in pairs
    }


# Integers -----------------------------------------------------------------------------------------


def test_integers_are_multiplied_out_on_the_device_to_the_same_bits():
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((5, 8, 8, 8)).astype(np.float16) * 7
    states = rng.standard_normal((5, 77, 16)).astype(np.float16)
    static = channel_scale(states)
    for stored in (
        latents_of(*quantize_latents(moments)),
        states_of(*quantize_states(states, static), static),
    ):
        before = stored.values.copy(), [scale.copy() for scale in stored.scales]
        tensor = to_device(stored, CPU)
        assert tensor.dtype == torch.float32
        assert tensor.numpy().tobytes() == stored.dequantize().tobytes()
        tensor.zero_()  # what training does with it must not reach the batch
        assert (stored.values == before[0]).all()
        for scale, kept in zip(stored.scales, before[1], strict=True):
            assert (scale == kept).all()


def test_what_is_no_integer_goes_to_the_device_as_it_is():
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    moved = to_device(array, CPU)
    assert (moved.dtype, moved.tolist()) == (torch.float16, array.tolist())
    tensor = torch.arange(3.0)
    assert to_device(tensor, CPU) is tensor


@pytest.mark.parametrize("name", ["mean", "mean-int8", "moments", "moments-int8"])
def test_a_batch_moved_to_the_device_is_what_the_shards_hold(data, name):
    config = TrainConfig(data=str(data), global_batch_size=8, **chosen(data, name, "int8"))
    batch = reader_of(config).gather(1, range(8))
    channels = 4 if name.startswith("mean") else 8
    moments = to_device(batch.moments, CPU)
    assert moments.shape == (8, channels, 8, 8)
    assert to_device(batch.states, CPU).shape == (8, 77, 128)
    exact = TrainConfig(data=str(data), global_batch_size=8, **chosen(data, "moments", "fp16"))
    wanted = reader_of(exact).gather(1, range(8))
    assert batch.samples.tolist() == wanted.samples.tolist()
    numbers = torch.as_tensor(wanted.moments)[:, :channels].float()
    half_a_step = numbers.abs().max().item() / 127 / 2 if "int8" in name else 0
    torch.testing.assert_close(moments.float(), numbers, rtol=0, atol=half_a_step)
    states = torch.as_tensor(wanted.states).float()
    torch.testing.assert_close(to_device(batch.states, CPU), states, rtol=0, atol=0.05)


def test_the_mean_alone_is_taken_as_it_is_whatever_the_posterior_noise():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 4, 5, 5, generator=generator).half()
    noise = torch.randn(3, 4, 5, 5, generator=generator)
    latents = sample_latents(mean, noise, 0.2)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, mean.float() * 0.2)
    assert torch.equal(latents, sample_latents(mean, 100 * noise, 0.2))
    moments = torch.cat([mean, torch.zeros_like(mean)], dim=1)
    torch.testing.assert_close(sample_latents(moments, noise, 0.2), (mean.float() + noise) * 0.2)


# Losses -------------------------------------------------------------------------------------------


def test_every_variant_trains_and_all_losses_are_near(losses):
    exact = losses["moments", "fp16"]
    for variant, found in losses.items():
        assert found == [pytest.approx(loss, rel=0.02) for loss in exact], variant


def test_int8_moments_change_the_losses_a_little_and_means_by_the_posterior_alone(losses):
    exact, mean = losses["moments", "fp16"], losses["mean", "fp16"]
    assert losses["moments-int8", "fp16"] == [pytest.approx(loss, rel=5e-3) for loss in exact]
    assert losses["mean-int8", "fp16"] == [pytest.approx(loss, rel=5e-3) for loss in mean]
    assert losses["moments", "int8"] == [pytest.approx(loss, rel=5e-3) for loss in exact]
    assert len({tuple(found) for found in losses.values()}) >= 5, "each reads another column"


def test_the_encoder_beside_token_ids_trains_as_stored_states_do(losses):
    stored = losses["moments", "fp16"]
    assert losses["moments", "ids"] == [pytest.approx(loss, rel=1e-4) for loss in stored]


def test_captions_matter_to_the_losses_that_were_compared(data, tmp_path, losses):
    """Or else all of the above would hold for any states."""
    columns = chosen(data, "moments", "fp16")
    dropped = run(tmp_path, data, caption_drop_prob=1.0, **columns)
    stored = losses["moments", "fp16"]
    assert dropped != [pytest.approx(loss, rel=1e-4) for loss in stored]


def test_dropped_captions_become_the_null_states_beside_token_ids_too(data, tmp_path):
    stored, encoded = (
        run(tmp_path / text, data, caption_drop_prob=1.0, **chosen(data, "moments", text))
        for text in ("fp16", "ids")
    )
    assert encoded == [pytest.approx(loss, rel=1e-4) for loss in stored]


def ids_source(data: Path, **options: Any) -> EncodedText:
    columns = chosen(data, "mean", "ids")
    config = TrainConfig(data=str(data), global_batch_size=8, **columns)
    text: Column[TextColumn] = Dataset(data).text_column(columns["text_column"])
    return EncodedText(reader_of(config), text, device=CPU, **options)


def test_the_encoder_beside_the_reader_gives_the_states_that_a_dataset_would_have(data):
    exact = TrainConfig(data=str(data), global_batch_size=8, **chosen(data, "mean", "fp16"))
    stored, source = reader_of(exact), ids_source(data)
    assert source.latent_shape == stored.latent_shape
    assert source.scaling_factor == stored.scaling_factor
    assert source.epoch_at(7) == stored.epoch_at(7)
    np.testing.assert_allclose(
        source.null_states.astype(np.float32), stored.null_states.astype(np.float32), atol=2e-3
    )
    batches = zip(source.iter_batches(3, range(8)), stored.iter_batches(3, range(8)), strict=False)
    for encoded, wanted in itertools.islice(batches, 3):
        assert encoded.step == wanted.step
        assert encoded.samples.tolist() == wanted.samples.tolist()
        assert encoded.moments.tobytes() == wanted.moments.tobytes()
        assert encoded.input_ids is None
        assert encoded.states.dtype == torch.float16
        expected = torch.as_tensor(wanted.states).float()
        torch.testing.assert_close(encoded.states.float(), expected, rtol=2e-3, atol=4e-3)


def test_the_reader_alone_hands_out_ids_and_says_what_to_do_about_missing_states(data):
    config = TrainConfig(data=str(data), global_batch_size=8, **chosen(data, "mean", "ids"))
    reader = reader_of(config)
    batch = reader.gather(0, range(8))
    assert batch.states is None
    assert batch.input_ids is not None
    assert (batch.input_ids.dtype, batch.input_ids.shape) == (np.uint16, (8, 77))
    assert reader.null_input_ids.shape == (77,)
    with pytest.raises(DatasetError, match=r"token ids alone.*--text ids"):
        _ = reader.null_states


# What is refused ----------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, data: Path, **changes: Any) -> str:
    line = error_line(capsys, lambda: main(argv_for(folder, data, **changes)))
    assert line.startswith("train: error: ")
    assert not [path for path in (folder / "run").rglob("*") if path.is_file()]
    return line


def test_another_text_encoder_than_the_datasets_is_refused(
    ids_only, model_folder, tmp_path, capsys
):
    line = refusal(capsys, tmp_path, ids_only, model=model_folder)
    assert str(model_folder / "text_encoder") in line
    assert "is another text encoder" in line
    assert str(TINY_MODEL) in line
    assert "--model" in line


def test_a_copy_of_the_datasets_text_encoder_is_as_good_as_itself(ids_only, tmp_path):
    copy = shutil.copytree(TINY_MODEL, tmp_path / "moved")
    losses = [
        run(tmp_path / name, ids_only, model=model, max_steps=2)
        for name, model in (("there", ""), ("moved", copy))
    ]
    assert losses[0] == losses[1]


def test_a_text_encoder_that_is_gone_is_one_line(ids_only, tmp_path, capsys):
    line = refusal(capsys, tmp_path, ids_only, model=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in line


def test_states_that_are_not_stored_cannot_be_asked_for(ids_only, tmp_path, capsys):
    line = refusal(capsys, tmp_path, ids_only, text="states")
    assert "text-ids-" in line
    assert "wanted a text column of states" in line
    assert "--text" in line


def test_ids_that_are_not_stored_alone_cannot_be_asked_for(latent_dataset, tmp_path, capsys):
    line = refusal(capsys, tmp_path, latent_dataset, text="ids")
    assert "wanted a text column of ids" in line


def test_several_image_columns_of_one_resolution_want_a_choice(data, tmp_path, capsys):
    line = refusal(capsys, tmp_path, data, text="ids")
    assert "--image-column" in line
    assert all(id_of(data, name) in line for name in LATENTS.values())


@pytest.mark.parametrize(("text", "stored"), [("ids", "fp16"), ("states", "ids")])
def test_a_text_column_that_is_not_what_text_asks_for_is_refused(
    data, tmp_path, capsys, text, stored
):
    columns = chosen(data, "mean", stored)
    line = refusal(capsys, tmp_path, data, text=text, **columns)
    assert columns["text_column"] in line


# Resume -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, ids_only: Path) -> Path:
    """Four steps beside the text encoder without a stop."""
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder, ids_only, max_steps=4)
    return folder / "run"


def test_a_run_beside_the_text_encoder_goes_on_exactly(ids_only, tmp_path, unbroken):
    run(tmp_path, ids_only, max_steps=2)
    run(tmp_path, ids_only, max_steps=4)
    assert_same_runs(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    "changes",
    [{"text": "ids"}, {"cache_gib": 0.5}, {"model": TINY_MODEL}, {"num_samples": 0}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_no_number_may_change_in_mid_run(ids_only, tmp_path, unbroken, changes):
    run(tmp_path, ids_only, max_steps=2, text="auto")
    run(tmp_path, ids_only, max_steps=4, **changes)
    assert_same_runs(tmp_path / "run", unbroken)


def test_a_moved_dataset_is_the_same_dataset(ids_only, tmp_path, unbroken):
    run(tmp_path, ids_only, max_steps=2)
    run(tmp_path, shutil.copytree(ids_only, tmp_path / "moved"), max_steps=4)
    assert_same_runs(tmp_path / "run", unbroken)


@pytest.mark.parametrize("other", [("mean", "ids"), ("moments", "fp16"), ("moments", "int8")])
def test_a_run_cannot_go_on_with_another_way_of_storage(data, tmp_path, capsys, other):
    run(tmp_path, data, max_steps=1, **chosen(data, "moments", "ids"))
    before = contents_of(tmp_path / "run")
    argv = argv_for(tmp_path, data, max_steps=3, **chosen(data, *other))
    line = error_line(capsys, lambda: main(argv))
    assert "the dataset has other columns or shards" in line
    assert contents_of(tmp_path / "run") == before


def test_the_run_records_how_captions_were_read(ids_only, unbroken):
    record = json.loads((unbroken / "config.json").read_text())
    assert record["settings"]["text"] == "auto"
    assert record["batches"].startswith("encoded-")
