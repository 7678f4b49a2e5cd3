"""Every way to store latents and captions: what is in the files, and what they cost."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NUM_SHARDS, SHARD_LENGTH, build_latent_dataset

from precompute.columns import CALIBRATION_CAPTIONS, image_columns, text_columns
from precompute.config import PrecomputeConfig
from precompute.job import precompute
from precompute.loading import choose_device
from precompute.model_folder import find_model
from precompute.text_encoder import TextEncoder
from shards.arrays import map_arrays, save_arrays
from shards.checksum import row_checksums, with_checksums
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column, Dataset
from shards.errors import DatasetError, UserError
from shards.ledger import OK, read_ledger
from shards.receipt import NULL, read_receipt, receipt_path
from shards.verify import iter_problems

LATENTS = ("moments", "mean", "moments-int8", "mean-int8")
TEXTS = ("fp16", "int8", "ids")
RESOLUTION = 32
NAMES = {
    **{"moments": f"moments-{RESOLUTION}", "mean": f"mean-{RESOLUTION}"},
    **{"moments-int8": f"moments-{RESOLUTION}-int8", "mean-int8": f"mean-{RESOLUTION}-int8"},
    **{"fp16": "text", "int8": "text-int8", "ids": "text-ids"},
}


@pytest.fixture(scope="module")
def run(model_folder: Path, image_shards: Path) -> Callable[..., None]:
    """`run(out, latents=..., text=...)`: a job at one resolution."""

    def run(out: Path, **options: Any) -> None:
        defaults = {"shards": f"{image_shards}/*.tar", "resolutions": str(RESOLUTION)}
        defaults |= {"model": str(model_folder), "device": "cpu"}
        precompute(PrecomputeConfig(out=str(out), batch_size=8, **defaults | options))

    return run


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, run: Callable[..., None]) -> Dataset:
    """All variants in one dataset, by four jobs."""
    out = tmp_path_factory.mktemp("storage") / "latents"
    for latents, text in zip(LATENTS, ("fp16", "int8", "ids", "ids"), strict=True):
        run(out, latents=latents, text=text)
    return Dataset(out)


def column_of(dataset: Dataset, storage: str) -> Column:
    (found,) = [c for c in dataset.columns.values() if c.spec.name == NAMES[storage]]
    return found


def shards_of(column: Column) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    for shard in sorted(column.shards):
        yield shard, column.map_shard(shard)


def dequantized(arrays: dict[str, np.ndarray], storage: str) -> np.ndarray:
    """Latents in float64, without the product's own arithmetic."""
    numbers = arrays[storage.partition("-")[0]].astype(np.float64)
    if storage.endswith("int8"):
        numbers = numbers * arrays["scale"].astype(np.float64)[:, :, None, None]
    return numbers


def test_every_variant_is_a_column_of_its_own_in_one_dataset(everything):
    names = [column.spec.name for column in everything.columns.values()]
    assert sorted(names) == sorted(NAMES.values())
    ids = list(everything.columns)
    assert all(re.fullmatch(r"(mean|moments|text)[a-z0-9-]*-[0-9a-f]{8}", one) for one in ids)
    assert len({one[-8:] for one in ids}) == len(NAMES)
    for column in everything.columns.values():
        assert column.num_rows == NUM_SHARDS * SHARD_LENGTH


def test_verify_finds_every_variant_clean_to_the_last_byte(everything):
    assert list(iter_problems(everything.path, full=True)) == []


@pytest.mark.parametrize("storage", NAMES)
def test_the_files_hold_the_declared_arrays_and_nothing_else(everything, storage):
    column = column_of(everything, storage)
    row_arrays = column.spec.row_arrays
    extra = {"row"} if storage in LATENTS else {"caption", "input_ids"}
    for shard, arrays in shards_of(column):
        assert arrays.keys() == {*row_arrays, "checksum", "index_checksum"} | extra
        stored = column.shards[shard]["rows"] if storage in LATENTS else 10  # captions twice each
        for name, (dtype, shape) in row_arrays.items():
            assert arrays[name].dtype == np.dtype(dtype), name
            assert arrays[name].shape == (stored, *shape), name
        assert (arrays["checksum"].dtype, arrays["checksum"].shape) == (np.uint64, (stored,))
        assert (arrays["checksum"] == row_checksums([arrays[name] for name in row_arrays])).all()


@pytest.mark.parametrize(
    ("storage", "arrays"),
    [
        ("moments", {"moments": ("float16", (8, 4, 4))}),
        ("mean", {"mean": ("float16", (4, 4, 4))}),
        ("moments-int8", {"moments": ("int8", (8, 4, 4)), "scale": ("float32", (8,))}),
        ("mean-int8", {"mean": ("int8", (4, 4, 4)), "scale": ("float32", (4,))}),
        ("fp16", {"states": ("float16", (77, 128))}),
        ("int8", {"states": ("int8", (77, 128)), "scale": ("float32", (77,))}),
        ("ids", {"input_ids": ("uint16", (77,))}),
    ],
)
def test_a_row_is_what_the_format_says(everything, storage, arrays):
    assert column_of(everything, storage).spec.row_arrays == arrays


def test_the_mean_is_the_first_half_of_the_moments_to_the_bit(everything):
    means = column_of(everything, "mean")
    for shard, arrays in shards_of(column_of(everything, "moments")):
        mean = means.map_shard(shard)["mean"]
        assert mean.tobytes() == arrays["moments"][:, :4].tobytes()
        assert means.map_shard(shard)["row"].tobytes() == arrays["row"].tobytes()


def test_the_means_of_int8_moments_are_those_of_int8_means(everything):
    """A channel has its own scale, so the log-variances beside it change nothing."""
    means = column_of(everything, "mean-int8")
    for shard, arrays in shards_of(column_of(everything, "moments-int8")):
        stored = means.map_shard(shard)
        assert stored["mean"].tobytes() == arrays["moments"][:, :4].tobytes()
        assert stored["scale"].tobytes() == arrays["scale"][:, :4].tobytes()


@pytest.mark.parametrize("storage", ["moments-int8", "mean-int8"])
def test_int8_latents_are_as_near_as_their_receipts_say(everything, storage):
    column, exact = column_of(everything, storage), column_of(everything, "moments")
    all_errors, all_squares = 0.0, 0.0
    for shard, arrays in shards_of(column):
        wanted = exact.map_shard(shard)["moments"].astype(np.float64)
        found = dequantized(arrays, storage)
        wanted = wanted[:, : found.shape[1]]
        step = arrays["scale"].astype(np.float64)[:, :, None, None]
        assert (np.abs(found - wanted) <= 0.5 * step * (1 + 1e-5)).all()
        errors = np.square(found - wanted)[:, :4].sum()
        squares = np.square(wanted)[:, :4].sum()
        stated = read_receipt(receipt_path(column.path_of(shard))).stats["relative_error"]
        assert stated == pytest.approx(math.sqrt(errors / squares), rel=1e-3, abs=1e-6)
        assert 0 < stated < 0.02
        all_errors, all_squares = all_errors + errors, all_squares + squares
    pooled = column.stats["relative_error"]
    assert pooled == pytest.approx(math.sqrt(all_errors / all_squares), rel=0.03)


def test_int8_states_are_as_near_as_their_receipts_say(everything):
    column, exact = column_of(everything, "int8"), column_of(everything, "fp16")
    static = everything.read_null(column)["channel_scale"].astype(np.float64)
    stated = []
    for shard, arrays in shards_of(column):
        wanted = exact.map_shard(shard)["states"].astype(np.float64)
        scale = arrays["scale"].astype(np.float64)
        found = arrays["states"] * scale[:, :, None] * static
        assert (np.abs(found - wanted) <= 0.5 * scale[:, :, None] * static * (1 + 1e-5)).all()
        error = math.sqrt(np.square(found - wanted).sum() / np.square(wanted).sum())
        stated.append(read_receipt(receipt_path(column.path_of(shard))).stats["relative_error"])
        assert stated[-1] == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert 0 < stated[-1] < 0.02
    assert min(stated) <= column.stats["relative_error"] <= max(stated)


@pytest.mark.parametrize("storage", ["moments", "mean", "fp16", "ids"])
def test_what_is_stored_exactly_states_no_error(everything, storage):
    column = column_of(everything, storage)
    assert "relative_error" not in column.stats
    for shard in column.shards:
        assert "relative_error" not in read_receipt(receipt_path(column.path_of(shard))).stats


def test_the_stated_deviation_is_that_of_what_training_will_see(everything):
    """The mean alone has less of it: the posterior's own is not in it."""
    stats = {storage: column_of(everything, storage).stats for storage in LATENTS}
    assert stats["mean"]["latent_std"] < stats["moments"]["latent_std"]
    assert stats["moments"]["latent_std"] == pytest.approx(1, abs=0.3)
    assert stats["mean-int8"] == {
        **stats["mean"],
        "relative_error": stats["mean-int8"]["relative_error"],
    }
    scaled = [
        dequantized(arrays, "mean") * column_of(everything, "mean").spec.scaling_factor
        for _, arrays in shards_of(column_of(everything, "mean"))
    ]
    assert stats["mean"]["latent_std"] == pytest.approx(np.concatenate(scaled).std(), rel=1e-4)


def test_the_token_ids_are_the_tokenizers_in_every_text_column(everything, model_folder):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model_folder / "tokenizer")
    for storage in TEXTS:
        for shard, arrays in shards_of(column_of(everything, storage)):
            rows = read_ledger(everything.path / "ledger" / f"{shard}.parquet")
            captions = [row["caption"] for row in rows if row["status"] == OK]
            wanted = tokenizer(
                captions, padding="max_length", truncation=True, max_length=77
            ).input_ids
            assert (arrays["caption"] >= 0).all()
            assert arrays["input_ids"].dtype == np.uint16
            assert arrays["input_ids"][arrays["caption"]].tolist() == wanted


def test_the_ids_column_has_no_states_anywhere(everything):
    column = column_of(everything, "ids")
    assert not column.spec.has_states
    bytes_per_caption = 77 * 2 + 8
    for shard, arrays in shards_of(column):
        assert sum(array.nbytes for array in arrays.values()) == 10 * bytes_per_caption + 20 * 4 + 8
        assert column.shards[shard]["bytes"] < 3000


def test_the_null_files_hold_the_empty_caption(everything, model_folder):
    encoder = TextEncoder(find_model(str(model_folder)), choose_device("cpu"), dtype=_float32())
    ids = encoder.tokenize([""])
    states = encoder.encode(ids).states.half().numpy()[0]
    nulls = {text: everything.read_null(column_of(everything, text)) for text in TEXTS}
    assert nulls["ids"].keys() == {"input_ids"}
    assert nulls["fp16"].keys() == {"input_ids", "states"}
    assert nulls["int8"].keys() == {"input_ids", "states", "channel_scale"}
    for text in TEXTS:
        assert nulls[text]["input_ids"].tolist() == ids[0].tolist()
    for text in ("fp16", "int8"):
        assert nulls[text]["states"].dtype == np.float16
        assert nulls[text]["states"].tobytes() == states.tobytes()
    captions = encoder.tokenize(list(CALIBRATION_CAPTIONS))
    calibration = encoder.encode(captions).states.half().numpy()
    static = np.abs(calibration[:, 1:].astype(np.float32)).max(axis=(0, 1))
    np.testing.assert_allclose(nulls["int8"]["channel_scale"], static, rtol=2e-3)
    assert nulls["int8"]["channel_scale"].dtype == np.float32


def _float32() -> Any:
    import torch

    return torch.float32


def test_the_same_commands_again_do_nothing(everything, run, capsys):
    files = sorted(path for path in everything.path.rglob("*") if path.is_file())
    before = [(path, path.stat().st_mtime_ns) for path in files]
    for latents, text in zip(LATENTS, ("fp16", "int8", "ids", "ids"), strict=True):
        capsys.readouterr()
        run(everything.path, latents=latents, text=text)
        assert "nothing to do" in capsys.readouterr().out
    files = sorted(path for path in everything.path.rglob("*") if path.is_file())
    assert [(path, path.stat().st_mtime_ns) for path in files] == before


def test_a_job_of_its_own_writes_the_same_column_as_one_beside_others(everything, run, tmp_path):
    run(tmp_path / "alone", latents="mean-int8", text="int8")
    alone = Dataset(tmp_path / "alone")
    for storage in ("mean-int8", "int8"):
        column, beside = column_of(alone, storage), column_of(everything, storage)
        assert column.column_id == beside.column_id
        for shard in [*column.shards, *([NULL] if storage == "int8" else [])]:
            assert column.path_of(shard).read_bytes() == beside.path_of(shard).read_bytes()


# Which column training takes ----------------------------------------------------------------------


def test_several_image_columns_at_one_resolution_must_be_chosen_by_id(everything):
    with pytest.raises(DatasetError, match=r"several: .*--image-column") as error:
        everything.image_column(RESOLUTION)
    for storage in LATENTS:
        column_id = column_of(everything, storage).column_id
        assert column_id in str(error.value)
        assert everything.image_column(RESOLUTION, column_id).column_id == column_id


def test_text_columns_are_chosen_by_what_they_hold(everything):
    assert everything.text_column(holding="ids").spec.name == "text-ids"
    for holding in ("auto", "states"):
        with pytest.raises(DatasetError, match=r"several: .*--text-column") as error:
            everything.text_column(holding=holding)
        assert "text-ids" not in str(error.value)
    for storage in TEXTS:
        column_id = column_of(everything, storage).column_id
        assert everything.text_column(column_id).column_id == column_id


def test_states_win_over_ids_and_ids_are_taken_where_there_is_nothing_else(run, tmp_path):
    run(tmp_path / "out", latents="mean", text="ids")
    alone = Dataset(tmp_path / "out")
    assert alone.text_column().spec.name == "text-ids"
    with pytest.raises(DatasetError, match="wanted a text column of states"):
        alone.text_column(holding="states")
    run(tmp_path / "out", latents="mean", text="fp16")
    both = Dataset(tmp_path / "out")
    assert both.text_column().spec.name == "text"
    assert both.text_column(holding="states").spec.name == "text"
    assert both.text_column(holding="ids").spec.name == "text-ids"


@pytest.mark.parametrize(
    "option", [{"latents": "median"}, {"text": "fp8"}], ids=["latents", "text"]
)
def test_an_unknown_storage_is_refused_before_anything_is_written(run, tmp_path, option):
    with pytest.raises((UserError, ValueError, KeyError)):
        run(tmp_path / "out", **option)
    assert not (tmp_path / "out" / "ledger").exists()


# What it costs ------------------------------------------------------------------------------------


def sd2_columns() -> tuple[ImageColumn, TextColumn]:
    """Means at 512 pixels and token ids, as Stable Diffusion 2 would have them."""
    encoder: dict[str, Any] = {"weights_sha256": "0" * 64, "encoder_config": {}}
    encoder |= {"compute_dtype": "float16"}
    image = ImageColumn(
        **encoder,
        storage_dtype="float16",
        latents="mean",
        resolution=512,
        latent_channels=4,
        latent_size=64,
        scaling_factor=0.18215,
        transform={},
    )
    text = TextColumn(
        **encoder, storage_dtype="none", num_tokens=77, dim=1024, tokenizer_sha256="1" * 64
    )
    return image, text


def test_a_sample_of_sd2_at_512_costs_at_most_33_and_a_half_kilobytes(tmp_path):
    image, text = sd2_columns()
    rows = 200
    rng = np.random.default_rng(0)
    num_bytes, on_disk = 0.0, 0
    for spec, index in ((image, "row"), (text, "caption")):
        arrays: dict[str, np.ndarray] = {}
        for name, (dtype, shape) in spec.row_arrays.items():
            num_bytes += np.dtype(dtype).itemsize * math.prod(shape)
            numbers = rng.integers(0, 1000, (rows, *shape))
            arrays[name] = numbers.astype(dtype)
        indices = np.arange(rows, dtype=np.int32)
        arrays = {**with_checksums(spec, arrays, indices), index: indices}
        num_bytes += 8 + 4
        path = tmp_path / f"{spec.column_id}.safetensors"
        save_arrays(path, arrays)
        mapped = map_arrays(path)
        assert all((mapped[name] == array).all() for name, array in arrays.items())
        on_disk += path.stat().st_size
    assert num_bytes == 4 * 64 * 64 * 2 + 77 * 2 + 2 * 12
    assert num_bytes <= on_disk / rows <= num_bytes + 10  # headers
    assert on_disk / rows <= 33_500


def test_the_documented_saving_holds_for_the_columns_that_a_job_writes(everything):
    """`mean` halves the bytes of an image, int8 halves them again, but for scales and indices."""
    sizes = {storage: column_of(everything, storage).num_bytes for storage in NAMES}
    rows = NUM_SHARDS * SHARD_LENGTH
    fixed = rows * 12 + NUM_SHARDS * 400  # checksum, index, header
    assert sizes["mean"] < sizes["moments"] / 2 + fixed
    assert sizes["mean-int8"] < sizes["mean"] / 2 + fixed + rows * 16
    assert sizes["int8"] < sizes["fp16"] / 2 + fixed + rows * 77 * 4
    assert sizes["ids"] < sizes["fp16"] / 100


def test_the_specs_of_a_job_name_the_storage_and_how_integers_came_about(model_folder):
    model = find_model(str(model_folder))
    for storage in LATENTS:
        (spec,) = image_columns(model, [RESOLUTION], "float32", storage)
        assert spec.name == NAMES[storage]
        assert bool(spec.quantization) == storage.endswith("int8")
    for text in TEXTS:
        (column,) = text_columns(model, "float32", text)
        assert column.name == NAMES[text]
        assert bool(column.quantization) == (text == "int8")


def test_a_null_file_of_another_column_is_refused(everything, tmp_path):
    out = build_latent_dataset(tmp_path / "x", [4], num_tokens=77, dim=128).path
    dataset = Dataset(out)
    text = dataset.text_column()
    theirs = everything.read_null(column_of(everything, "ids"))
    save_arrays(text.path_of(NULL), theirs)
    assert map_arrays(text.path_of(NULL)).keys() == {"input_ids"}
    with pytest.raises(DatasetError, match="python -m shards repair"):
        dataset.read_null(text)
