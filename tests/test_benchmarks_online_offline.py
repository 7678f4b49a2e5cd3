"""Online against offline: equal work on both sides, honest arithmetic, one JSON line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_python

from benchmarks.flops import flops_per_image, predicted_ratio
from benchmarks.online_offline import check_equal_losses, totals
from benchmarks.result import spread
from precompute.model_folder import ModelFolder
from precompute.online import OnlineBatches
from precompute.online_samples import samples_of_dataset
from shards.column import ImageColumn, TextColumn
from shards.dataset import Dataset
from shards.errors import UserError
from shards.find_shards import find_shards
from shards.image_index import ShardIndex
from shards.image_shards import ShardStream
from shards.reader import LatentReader

SD2_VAE = {
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
SD2_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "gelu",
}


def open_sources(latents: Path, batch_size: int) -> tuple[LatentReader, OnlineBatches]:
    dataset = Dataset(latents)
    image, text = dataset.image_column(64), dataset.text_column()
    reader = LatentReader(
        dataset, image, text, seed=3, global_batch_size=batch_size, num_partitions=4
    )
    online = OnlineBatches(
        samples_of_dataset(reader, image), image, text, device=torch.device("cpu"), num_workers=2
    )
    return reader, online


def test_both_arms_yield_the_same_samples_with_the_same_latents_and_states(latent_dataset):
    reader, online = open_sources(latent_dataset, 8)
    offline_batches = reader.iter_batches(5, range(2, 8))
    online_batches = online.iter_batches(5, range(2, 8))
    for _ in range(8):  # beyond one epoch
        stored, encoded = next(offline_batches), next(online_batches)
        assert stored.step == encoded.step
        np.testing.assert_array_equal(stored.samples, encoded.samples)
        np.testing.assert_allclose(
            stored.moments.astype(np.float32), encoded.moments.float().numpy(), rtol=2e-3, atol=2e-3
        )
        np.testing.assert_allclose(
            stored.states.astype(np.float32), encoded.states.float().numpy(), rtol=2e-3, atol=2e-3
        )


def test_the_two_arms_of_another_step_differ(latent_dataset):
    reader, online = open_sources(latent_dataset, 8)
    stored = reader.gather(1, range(8))
    encoded = next(online.iter_batches(2, range(8)))
    assert not np.allclose(stored.moments, encoded.moments.float().numpy(), atol=2e-3)


def test_a_sample_read_by_position_is_the_one_that_streaming_finds(image_shards):
    shards, _ = find_shards(str(image_shards / "*.tar"))
    for shard in shards:
        index = ShardIndex(shard.url)
        streamed = list(ShardStream(shard))
        assert len(index) == len(streamed)
        for row in reversed(range(len(streamed))):
            assert index.read(row) == streamed[row]


def test_an_image_shard_that_is_no_tar_cannot_be_indexed(tmp_path):
    path = tmp_path / "00000.tar"
    path.write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match=r"00000\.tar.*by position"):
        ShardIndex(str(path))


def sd2_columns(resolution: int) -> tuple[ImageColumn, TextColumn]:
    common = {"weights_sha256": "", "encoder_config": {}, "compute_dtype": "float32"}
    common["storage_dtype"] = "float16"
    image = ImageColumn(
        **common,
        resolution=resolution,
        latent_channels=4,
        latent_size=resolution // 8,
        scaling_factor=0.18215,
        transform={},
    )
    return image, TextColumn(**common, num_tokens=77, dim=1024, tokenizer_sha256="")


@pytest.mark.parametrize(
    ("resolution", "unet_gflop", "ratio"), [(256, 539.311, 1.589), (512, 2408.741, 1.482)]
)
def test_sd2_flops_and_the_ratio_that_they_predict(tmp_path, resolution, unet_gflop, ratio):
    for part, config in (("vae", SD2_VAE), ("text_encoder", SD2_TEXT)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    model = ModelFolder("sd2", tmp_path)
    flops = flops_per_image("sd2-base", model, *sd2_columns(resolution))
    assert flops["unet"] / 1e9 == pytest.approx(unet_gflop, abs=0.001)
    assert predicted_ratio(flops) == pytest.approx(ratio, abs=0.001)


def test_totals_reproduce_the_published_run_with_its_encoding_counted():
    # GPU-hours of the published SD2 run: U-Net alone, online (1.4 times that), and stage 1.
    unet_hours, online_hours, encode_hours = 15_615, 1.4 * 15_615, 3_784
    result = totals(1 / online_hours, 1 / unet_hours, 1 / encode_hours)
    assert result["speedup_with_stage1"]["1"] == pytest.approx(1.127, abs=0.001)
    assert result["break_even_epochs"] == pytest.approx(0.61, abs=0.01)
    assert 1.127 < result["speedup_with_stage1"]["2"] < result["speedup_with_stage1"]["10"] < 1.4


def test_there_is_no_break_even_when_offline_is_not_faster():
    assert totals(10.0, 10.0, 5.0)["break_even_epochs"] is None


def test_spread_is_the_median_between_two_percentiles():
    assert spread([3.0, 1.0, 2.0]) == pytest.approx({"median": 2.0, "p10": 1.2, "p90": 2.8})


def write_losses(scratch: Path, **losses: list[float]) -> None:
    for arm, values in losses.items():
        (scratch / arm).mkdir()
        rows = [json.dumps({"step": n, "train/loss": v}) + "\n" for n, v in enumerate(values)]
        (scratch / arm / "metrics.jsonl").write_text("".join(rows))


def test_no_time_is_reported_when_the_arms_trained_on_different_things(tmp_path):
    write_losses(tmp_path, offline=[0.5, 0.4], online=[0.5, 0.401])
    with pytest.raises(UserError, match=r"losses differ at step 1"):
        check_equal_losses(tmp_path)


def test_losses_within_the_rounding_of_the_cache_are_equal(tmp_path):
    write_losses(tmp_path, offline=[0.5, 0.4], online=[0.5001, 0.4001])
    check_equal_losses(tmp_path)


def test_the_command_ends_with_one_json_line_that_it_also_writes(latent_dataset, tmp_path):
    out = tmp_path / "result.json"
    short = ["--global-batch-size", 4, "--blocks", 2, "--steps", 1, "--warmup", 1]
    done = run_python("-m", "benchmarks", "--data", latent_dataset, *short, "--out", out)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed == json.loads(out.read_text())
    offline, online = (printed["sec_per_step"][arm] for arm in ("offline", "online"))
    ratios = [b / a for a, b in zip(offline, online, strict=True)]
    assert printed["offline_speedup"]["median"] == pytest.approx(np.median(ratios))
    assert printed["environment"]["versions"]["torch"] == torch.__version__


def test_a_dataset_whose_model_is_gone_cannot_be_benched(make_latent_dataset, tmp_path):
    make_latent_dataset(tmp_path / "latents", [32, 32], model=str(tmp_path / "gone"))
    done = run_python("-m", "benchmarks", "--data", tmp_path / "latents")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "gone") in done.stderr
