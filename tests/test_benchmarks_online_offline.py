"""Online against offline: equal work in all arms, honest arithmetic, one JSON line."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_python

from benchmarks.arms import MEANING, Arms, Blocks, ResidentBatches, Timed, open_columns
from benchmarks.break_even import encode_images_per_sec, totals
from benchmarks.equal_work import WatchedSource, check_equal_batches, check_equal_losses
from benchmarks.online_offline import (
    BenchConfig,
    arm_figures,
    compare,
    is_noisy,
    measure,
    time_ratios,
    train_config,
)
from precompute.config import PrecomputeConfig
from precompute.job import precompute
from precompute.online import OnlineBatches
from precompute.online_samples import samples_of_dataset
from shards.batch import LatentBatch
from shards.dataset import Dataset
from shards.errors import UserError
from shards.find_shards import find_shards
from shards.image_index import ShardIndex
from shards.image_shards import ShardStream
from shards.reader import LatentReader

ALL = ("resident", "offline", "ids", "online")
SHORT = BenchConfig(global_batch_size=4, blocks=2, steps=1, warmup=1, out="-")


@pytest.fixture(scope="module")
def dataset(
    tmp_path_factory: pytest.TempPathFactory,
    latent_dataset: Path,
    image_shards: Path,
    model_folder: Path,
) -> Path:
    """`latent_dataset` with a column of token ids beside that of the states."""
    path = tmp_path_factory.mktemp("bench") / "latents"
    shutil.copytree(latent_dataset, path)
    job = PrecomputeConfig(
        shards=str(image_shards / "*.tar"), out=str(path), model=str(model_folder), device="cpu"
    )
    precompute(replace(job, resolutions="none", text="ids"))
    return path


def open_reader(dataset: Path, batch_size: int) -> LatentReader:
    found = Dataset(dataset)
    image, text = found.image_column(64), found.text_column()
    return LatentReader(found, image, text, seed=3, global_batch_size=batch_size, num_partitions=4)


def open_sources(latents: Path, batch_size: int) -> tuple[LatentReader, OnlineBatches]:
    found, reader = Dataset(latents), open_reader(latents, batch_size)
    image, text = found.image_column(64), found.text_column()
    online = OnlineBatches(
        samples_of_dataset(reader, image), image, text, device=torch.device("cpu"), num_workers=2
    )
    return reader, online


# The sources --------------------------------------------------------------------------------------


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


def test_one_step_decoded_alone_is_what_the_stream_of_steps_has(latent_dataset):
    _, online = open_sources(latent_dataset, 8)
    batch = next(online.iter_batches(3, range(8)))
    images = online.decode(3, range(8))
    assert [image.number for image in images] == batch.samples.tolist()
    moments = online.encoders.encode_images([image.square for image in images])
    torch.testing.assert_close(moments, batch.moments)


def test_resident_batches_are_the_readers_and_outlive_its_buffers(latent_dataset):
    reader = open_reader(latent_dataset, 8)
    source = ResidentBatches(reader, torch.device("cpu"), num_steps=3).iter_batches(2, range(8))
    served = [next(source) for _ in range(7)]  # more than twice what is loaded at a time
    assert [batch.step for batch in served] == [2, 3, 4, 5, 6, 7, 8]
    for batch in served:
        expected = open_reader(latent_dataset, 8).gather(batch.step, range(8))
        assert torch.is_tensor(batch.moments)
        np.testing.assert_array_equal(batch.samples, expected.samples)
        np.testing.assert_array_equal(batch.moments.numpy(), expected.moments)
        np.testing.assert_array_equal(batch.states.numpy(), expected.states)


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


# The arms -----------------------------------------------------------------------------------------


def test_the_arms_share_one_model_and_leave_its_weights_as_they_are(dataset, tmp_path):
    config = train_config(replace(SHORT, data=str(dataset)))
    columns = open_columns(Dataset(dataset), config)
    arms = Arms(config, columns, ALL, Blocks(blocks=2, warmup=1, steps=2), tmp_path)
    models = {id(trainer.model) for trainer in arms.trainers.values()}
    assert len(models) == 1
    model = arms.trainers["online"].model
    before = {name: weight.clone() for name, weight in model.weights.tensors.items()}
    timed = arms.run()
    arms.close()
    assert list(timed) == list(ALL)
    for name, weight in model.weights.tensors.items():
        assert torch.equal(weight, before[name]), name
        assert model.update.optimizer.state[weight]["exp_avg"].abs().sum() > 0, name
        assert torch.equal(model.average.weights[name], weight), name
    assert all(trainer.step == 6 for trainer in arms.trainers.values())


def first_row(stored: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    rows = torch.as_tensor(stored).float().clone()
    rows[0] = change(rows[0])
    return rows


def larger_latents(batch: LatentBatch) -> LatentBatch:
    return replace(batch, moments=torch.as_tensor(batch.moments).float() * 1.01)


def rows_in_another_order(batch: LatentBatch) -> LatentBatch:
    return replace(batch, moments=torch.as_tensor(batch.moments).flip(0))


def mirrored(batch: LatentBatch) -> LatentBatch:
    return replace(batch, moments=torch.as_tensor(batch.moments).flip(-1))


def one_caption_dropped(batch: LatentBatch) -> LatentBatch:
    return replace(batch, states=first_row(batch.states, lambda row: row * 0))


def captions_swapped(batch: LatentBatch) -> LatentBatch:
    return replace(batch, states=torch.as_tensor(batch.states).roll(1, 0))


def one_image_replaced(batch: LatentBatch) -> LatentBatch:
    return replace(batch, moments=first_row(batch.moments, lambda row: row.flip(-2)))


def another_sample(batch: LatentBatch) -> LatentBatch:
    return replace(batch, samples=np.concatenate([batch.samples[:1] + 1, batch.samples[1:]]))


SABOTAGE = [larger_latents, rows_in_another_order, mirrored, one_caption_dropped]
SABOTAGE += [captions_swapped, one_image_replaced, another_sample]


def sabotage_arm(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[LatentBatch], LatentBatch]
) -> None:
    open_source = Arms._open

    def open_sabotaged(self: Arms, asked: Any) -> Any:
        source = open_source(self, asked)
        if asked == name:
            iter_batches: Callable[..., Iterator[LatentBatch]] = source.iter_batches

            def changed(*where: Any) -> Iterator[LatentBatch]:
                yield from map(change, iter_batches(*where))

            monkeypatch.setattr(source, "iter_batches", changed)
        return source

    monkeypatch.setattr(Arms, "_open", open_sabotaged)


@pytest.mark.parametrize(
    ("name", "change"),
    [("online", change) for change in SABOTAGE]
    + [("ids", captions_swapped), ("offline", mirrored), ("resident", one_image_replaced)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_arm_that_does_other_work_ends_the_benchmark(dataset, monkeypatch, capsys, name, change):
    sabotage_arm(monkeypatch, name, change)
    with pytest.raises(UserError, match=r"same work in every arm|of their size") as failure:
        measure(replace(SHORT, data=str(dataset)))
    assert (name if name not in ("offline", "resident") else "resident") in str(failure.value)
    assert "it/s" not in capsys.readouterr().out


def test_an_arm_with_another_loss_ends_the_benchmark(dataset, monkeypatch, capsys):
    """As it would with other noise, or other weights: what is served is the same."""
    run_block = Arms._time

    def other_loss(self: Arms, name: str, block: int) -> Timed:
        found = run_block(self, name, block)
        return replace(found, loss=found.loss * 1.001) if name == "online" else found

    monkeypatch.setattr(Arms, "_time", other_loss)
    with pytest.raises(UserError, match="losses differ in block 1"):
        measure(replace(SHORT, data=str(dataset)))
    assert "it/s" not in capsys.readouterr().out


def test_the_online_arm_runs_both_encoders_in_every_step(dataset, monkeypatch):
    from precompute.online_encoders import Encoders

    calls = {"encode_images": 0, "encode_texts": 0}
    for name in calls:
        encode = getattr(Encoders, name)

        def counted(self: Encoders, what: Any, name: str = name, encode: Any = encode) -> Any:
            calls[name] += 1
            return encode(self, what)

        monkeypatch.setattr(Encoders, name, counted)
    document = measure(replace(SHORT, data=str(dataset)))
    num_steps = 2 * (SHORT.warmup + SHORT.steps)
    timed_alone = 1 + len(document["components"]["vae"]["samples"])
    assert calls["encode_images"] == num_steps + timed_alone
    assert calls["encode_texts"] == num_steps + timed_alone + 1  # the empty caption


def served(**changes: Any) -> tuple[np.ndarray, LatentBatch]:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "samples": np.arange(4),
        "moments": rng.standard_normal((4, 8, 2, 2)).astype(np.float16),
        "states": rng.standard_normal((4, 5, 3)).astype(np.float16),
    }
    batch = LatentBatch(step=0, **{**arrays, **changes})
    return np.stack([batch.samples, batch.samples]), batch


def test_what_rounding_makes_of_a_batch_is_equal_and_more_is_not():
    _, stored = served()
    exact = served(moments=stored.moments.astype(np.float32) * (1 + 2e-4))
    check_equal_batches({"a": served(), "b": exact}, 4, ("float16", "float16"))
    more = served(moments=stored.moments.astype(np.float32) * (1 + 1e-2))
    with pytest.raises(UserError, match=r"latents of b differ from those of a by 0\.01"):
        check_equal_batches({"a": served(), "b": more}, 4, ("float16", "float16"))
    check_equal_batches({"a": served(), "b": more}, 4, ("int8", "float16"))


def test_a_batch_that_is_not_finite_is_not_equal():
    _, stored = served()
    broken = served(states=np.full_like(stored.states, np.nan))
    with pytest.raises(UserError, match="text states"):
        check_equal_batches({"a": served(), "b": broken}, 4, ("float16", "float16"))


def test_a_watched_source_serves_what_it_watches_and_closes_it(latent_dataset):
    reader = open_reader(latent_dataset, 8)
    watched = WatchedSource(reader, block_length=3)
    batches: Any = watched.iter_batches(3, range(8))
    found = [next(batches) for _ in range(3)]
    samples, kept = watched.take()
    assert kept is found[0]
    assert samples.tolist() == [batch.samples.tolist() for batch in found]
    assert watched.samples == []
    batches.close()
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_losses_within_the_tolerance_are_equal():
    check_equal_losses({"resident": 0.5, "ids": 0.50004, "online": 0.49996}, 1e-4, 0)


@pytest.mark.parametrize("loss", [0.5001, 0.499, float("nan"), float("inf")])
def test_losses_that_differ_by_more_are_refused(loss):
    with pytest.raises(UserError, match="losses differ in block 3"):
        check_equal_losses({"offline": 0.5, "online": loss}, 1e-4, 2)


def test_without_token_ids_the_other_arms_run_and_the_reason_is_given(latent_dataset, capsys):
    document = measure(replace(SHORT, data=str(latent_dataset)))
    assert list(document["arms"]) == ["resident", "offline", "online"]
    assert "--text ids" in document["not_measured"]["ids"]


def test_with_several_columns_of_token_ids_that_is_the_reason(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "latents")
    found = Dataset(tmp_path / "latents")
    ids = found.text_column(holding="ids")
    manifest = json.loads((tmp_path / "latents" / "dataset.json").read_text())
    another = f"{ids.column_id[:-1]}x"
    manifest["columns"][another] = manifest["columns"][ids.column_id]
    (tmp_path / "latents" / "dataset.json").write_text(json.dumps(manifest))
    config = train_config(replace(SHORT, data=str(tmp_path / "latents")))
    columns = open_columns(Dataset(tmp_path / "latents"), config)
    assert columns.token_ids is None
    assert "several" in columns.no_token_ids


def test_a_batch_of_more_than_all_images_is_refused(dataset):
    with pytest.raises(UserError, match="--global-batch-size: 1000"):
        measure(replace(SHORT, data=str(dataset), global_batch_size=1000))


def test_ids_alone_without_token_ids_have_nothing_to_run(latent_dataset):
    with pytest.raises(UserError, match="--arms: ids"):
        measure(replace(SHORT, data=str(latent_dataset), arms=("ids",)))


@pytest.mark.parametrize(
    "wrong",
    [{"blocks": -1}, {"steps": 0}, {"warmup": -1}, {"arms": ()}, {"arms": ("online", "online")}],
    ids=str,
)
def test_settings_that_make_no_block_are_refused(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        measure(replace(SHORT, **wrong))


def test_a_batch_for_hundreds_of_gpus_is_cut_down_to_one_devices():
    on_gpu = torch.cuda.is_available()
    large = train_config(BenchConfig(preset="sd2-base-512"))
    assert large.global_batch_size == (64 if on_gpu else 1)
    assert large.micro_batch_size == 0
    assert large.ema_decay == 0.9999
    assert train_config(BenchConfig(preset="tiny")).global_batch_size == 32
    assert train_config(BenchConfig(global_batch_size=6, ema="off")).global_batch_size == 6
    assert train_config(BenchConfig(ema="off")).ema_decay == 0


# The figures --------------------------------------------------------------------------------------


def timed(*seconds: float) -> list[Timed]:
    return [Timed(sec, 0.1, 0.5) for sec in seconds]


def test_ratios_are_taken_block_by_block():
    found = {"resident": timed(1.0, 2.0, 4.0), "offline": timed(2.0, 4.0, 8.0)}
    found["online"] = timed(3.0, 6.0, 12.0)
    assert time_ratios(found, "online", "offline") == [1.5] * 3
    figures = arm_figures("offline", found, 10)
    assert figures["share_of_ceiling"] == {"median": 0.5, "p10": 0.5, "p90": 0.5}
    assert figures["images_per_sec"]["median"] == 2.5
    assert figures["sec_per_step"] == [2.0, 4.0, 8.0]


def parts(decode: float, vae: float, text: float) -> dict[str, Any]:
    named = {"decode": decode, "vae": vae, "text": text}
    return {name: {"sec_per_step": {"median": sec}} for name, sec in named.items()}


def test_stage_one_hides_decoding_behind_a_gpus_encoders_and_adds_it_on_a_cpu():
    assert encode_images_per_sec(parts(1.0, 2.0, 1.0), 8, "cuda") == 8 / 3
    assert encode_images_per_sec(parts(4.0, 2.0, 1.0), 8, "cuda") == 2
    assert encode_images_per_sec(parts(1.0, 2.0, 1.0), 8, "cpu") == 2


def test_totals_follow_from_the_ratio_and_not_from_medians_of_different_moments():
    # One of five blocks of each arm was slow, another one for each.
    found = {"offline": timed(1, 1, 9, 9, 9), "online": timed(1.5, 1.5, 13.5, 13.5, 1.5)}
    document = compare(found, parts(1.0, 1.0, 1.0), 8, "cpu")
    assert document["offline_speedup"]["median"] == 1.5
    ten = document["totals"]["epochs"]["10"]
    assert ten["online_sec_per_image"] == pytest.approx(10 * 9 * 1.5 / 8)
    assert document["totals"]["break_even_epochs"] == pytest.approx(3 / (9 * 0.5))
    assert document["is_noisy"]


def test_a_ratio_is_noisy_when_it_crosses_one_or_spreads_widely():
    assert is_noisy({"median": 1.1, "p10": 0.9, "p90": 1.2})
    assert is_noisy({"median": 2.0, "p10": 1.5, "p90": 2.4})
    assert not is_noisy({"median": 1.5, "p10": 1.4, "p90": 1.6})


def test_there_is_no_ceiling_without_its_arm():
    assert "share_of_ceiling" not in arm_figures("online", {"online": timed(1.0)}, 1)


def test_totals_reproduce_the_published_run_with_its_encoding_counted():
    # GPU-hours of the published SD2 run: U-Net alone, online (1.4 times that), and stage 1.
    unet_hours, online_hours, encode_hours = 15_615, 1.4 * 15_615, 3_784
    result = totals(1 / online_hours, 1 / unet_hours, 1 / encode_hours)
    assert result.epochs["1"].speedup == pytest.approx(1.127, abs=0.001)
    assert result.epochs["1"].offline_sec_per_image == pytest.approx(15_615 + 3_784)
    assert result.epochs["10"].online_sec_per_image == pytest.approx(218_610)
    assert result.break_even_epochs == pytest.approx(0.61, abs=0.01)
    assert 1.127 < result.epochs["2"].speedup < result.epochs["10"].speedup < 1.4


def test_there_is_no_break_even_when_offline_is_not_faster():
    assert totals(10.0, 10.0, 5.0).break_even_epochs is None
    assert totals(12.0, 10.0, 5.0).break_even_epochs is None


# The command --------------------------------------------------------------------------------------


def test_the_command_ends_with_one_json_line_that_it_also_writes(dataset, tmp_path):
    out = tmp_path / "result.json"
    short = ["--global-batch-size", 4, "--blocks", 2, "--steps", 1, "--warmup", 1]
    done = run_python("-m", "benchmarks", "--data", dataset, *short, "--out", out)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed == json.loads(out.read_text())
    assert list(printed["arms"]) == list(ALL)
    offline, online = (printed["arms"][arm]["sec_per_step"] for arm in ("offline", "online"))
    ratios = [b / a for a, b in zip(offline, online, strict=True)]
    assert printed["offline_speedup"]["median"] == pytest.approx(np.median(ratios))
    assert set(printed["components"]) == {"unet", "optimizer", "ema", "decode", "vae", "text"}
    for part in printed["components"].values():
        assert len(part["samples"]) == 2
        assert part["sec_per_step"]["median"] == pytest.approx(np.median(part["samples"]))
    flops = printed["flops_per_image"]
    assert printed["flops_predicted_speedup"] == pytest.approx(sum(flops.values()) / flops["unet"])
    assert printed["arms"]["resident"]["share_of_ceiling"]["median"] == 1
    assert set(printed["totals"]["epochs"]) == {"1", "2", "3", "10"}
    assert printed["environment"]["versions"]["torch"] == torch.__version__
    table = done.stdout
    for arm in ALL:
        assert MEANING[arm] in table
    assert "FLOPs alone predict" in table
    assert "break-even" in table


def test_a_dataset_whose_model_is_gone_cannot_be_benched(make_latent_dataset, tmp_path):
    make_latent_dataset(tmp_path / "latents", [32, 32], model=str(tmp_path / "gone"))
    done = run_python("-m", "benchmarks", "--data", tmp_path / "latents", "--out", "-")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "gone") in done.stderr


def test_a_command_that_is_unknown_is_told_the_nearest(tmp_path):
    done = run_python("-m", "benchmarks", "trainstep")
    assert done.returncode == 2
    assert "python -m benchmarks train-step" in done.stderr
    assert "Traceback" not in done.stderr
