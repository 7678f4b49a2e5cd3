"""Where prompts come from: files, COCO, and exactly what a run was not trained on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import status_of
from helpers_generate import run_on_dataset
from helpers_train import newest_checkpoint

from evaluate.prompts import captions_of, coco_prompts, load_prompts
from evaluate.training_run import TRAINING, TrainingRun
from shards.dataset import Dataset
from shards.errors import UserError
from shards.held_out import choose_held_out
from shards.layout import MANIFEST, ledger_path
from shards.ledger import read_ledger
from shards.order import choose_partitions
from shards.reader import LatentReader

# Files --------------------------------------------------------------------------------------------


def test_a_text_is_split_at_semicolons_and_a_file_at_line_ends(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa lion; a leaf\r\n\n  the sea \n".encode())
    assert load_prompts("a lion; a leaf;; the sea ", "x").texts == ["a lion", "a leaf", "the sea"]
    prompts = load_prompts(str(path), "x")
    assert prompts.texts == ["a lion; a leaf", "the sea"]
    assert prompts.keys == []


def test_more_images_than_prompts_take_them_again_in_turn():
    texts = load_prompts("a; b; c", "x", num_images=7).texts
    assert texts == ["a", "b", "c", "a", "b", "c", "a"]
    assert load_prompts("a; b; c", "x", num_images=2).texts == ["a", "b"]


def test_json_lines_may_hold_prompts_or_captions_and_keys(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "a\u2028lion\n", "key": "x/1"},
        {"caption": "a leaf", "id": 3},
        {"prompt": "", "caption": "not this"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n\n".join(lines), encoding="utf-8", newline="\n")
    prompts = load_prompts(str(path), "x", num_images=4)
    assert prompts.texts == ["a\u2028lion\n", "a leaf", "", "a\u2028lion\n"]
    assert prompts.keys == ["x/1", "", "", "x/1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}\n', "line 2: no prompt"),
        ('{"prompt": null}', "line 1: no prompt"),
        ('{"text": "a"}', "line 1: no prompt"),
        ('["prompt"]', "line 1: no prompt"),
        ('{"prompt": "a"', "line 1: no prompt"),
        ("[" * 100_000, "line 1: no prompt"),
        ("\n \n", "no prompts"),
        ('{"prompt": "\\ud800 lion"}', "line 1: no prompt"),
        ('{"prompt": "a", "key": "\\udc00"}', "line 1: no prompt"),
    ],
)
def test_json_lines_without_prompts_are_refused_by_line(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refusal:
        load_prompts(str(path), "x")
    assert len(str(refusal.value)) < 400


def test_bytes_of_a_command_line_that_are_no_text_are_refused():
    with pytest.raises(UserError, match=r"--prompts: .* is not UTF-8"):
        load_prompts(os.fsdecode(b"\xff\xfe lion"), "x")


def test_a_protocol_without_its_file_is_no_prompt():
    with pytest.raises(UserError, match="--prompts: names no file"):
        load_prompts("coco:", "x")


def test_a_key_that_is_null_is_none(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "key": null}\n{"prompt": "b", "key": 0}\n')
    assert load_prompts(str(path), "x").keys == ["", "0"]


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.txt", "coco:gone.json"])
def test_a_file_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match=f"no file {name.removeprefix('coco:')}"):
        load_prompts(name, "x")


def test_captions_for_sample_grids_differ(latent_dataset):
    captions = captions_of(Dataset(latent_dataset), 5)
    assert len(captions) == len(set(captions)) == 5


# COCO ---------------------------------------------------------------------------------------------


def write_coco(path: Path, num_images: int = 40) -> Path:
    """Three to five captions of each image, in no order, with COCO's own untidy blanks."""
    rows = [
        {"image_id": image, "id": 1000 + 7 * image + n, "caption": f" caption {n}\n of  {image}. "}
        for n in range(5)
        for image in range(num_images)
        if n < 3 + image % 3
    ]
    path.write_text(json.dumps({"info": {}, "annotations": rows[::-1], "images": []}))
    return path


def test_one_caption_of_each_of_so_many_images(tmp_path):
    path = write_coco(tmp_path / "captions_val2014.json")
    prompts = load_prompts(f"coco:{path}", "x", num_images=40)
    assert sorted(map(int, prompts.keys)) == list(range(40))
    for text, key in zip(prompts.texts, prompts.keys, strict=True):
        word, number, of, image = text.rstrip(".").split(" ")
        assert (word, of, image) == ("caption", "of", key)
        assert int(number) < 5
    assert len({text.split()[1] for text in prompts.texts}) > 1, "not always the first caption"


def test_the_choice_is_fixed_by_the_seed_and_fewer_are_the_beginning_of_more(tmp_path):
    path = str(write_coco(tmp_path / "captions.json"))
    few, many, again, other = (
        coco_prompts(path, count, seed) for count, seed in ((10, 0), (30, 0), (30, 0), (30, 1))
    )
    assert many == again
    assert few.texts == many.texts[:10]
    assert few.keys == many.keys[:10]
    assert set(other.keys) != set(many.keys)
    assert few.keys[:5] == ["16", "31", "10", "39", "35"], "as every release chooses"


def test_the_order_of_the_file_does_not_matter(tmp_path):
    path = write_coco(tmp_path / "captions.json")
    document = json.loads(path.read_text())
    document["annotations"].sort(key=lambda row: row["id"])
    (tmp_path / "sorted.json").write_text(json.dumps(document))
    assert coco_prompts(str(path), 20) == coco_prompts(str(tmp_path / "sorted.json"), 20)


def test_thirty_thousand_are_meant_where_no_number_is_given(tmp_path):
    path = write_coco(tmp_path / "captions.json")
    with pytest.raises(UserError, match=r"captions of 40 images; wanted 30000.*--num-images 40"):
        load_prompts(f"coco:{path}", "x")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"annotations": [{"image_id": 1}]}',
        '{"annotations": 3}',
        '{"annotations": [{"image_id": 1, "id": 2, "caption": 3}]}',
        '{"annotations": [{"image_id": 1, "id": 2, "caption": "\\ud800"}]}',
    ],
)
def test_a_file_that_holds_no_captions_is_refused(tmp_path, text):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"captions\.json: not captions of COCO"):
        coco_prompts(str(path), 1)


# What a run held out ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, latent_dataset: Path) -> Path:
    return run_on_dataset(tmp_path_factory.mktemp("run"), latent_dataset)


def test_exactly_what_training_held_out_is_prompted(run, latent_dataset):
    """An epoch of the run's own reader serves all samples but these."""
    dataset = Dataset(latent_dataset)
    image, text = dataset.image_column(32), dataset.text_column()
    reader = LatentReader(
        dataset,
        image,
        text,
        seed=0,
        global_batch_size=4,
        num_partitions=choose_partitions(4, 0),
        held_out=choose_held_out(dataset, image, 3),
    )
    assert reader.identity == json.loads((run / "config.json").read_text())["batches"]
    batches = reader.iter_batches(0, range(4))
    served: set[str] = set()
    for _ in range(2 * image.num_rows // 4):
        served |= set(reader.keys_of(next(batches).samples))
    prompts = load_prompts("held-out", str(run))
    assert len(prompts) == 3
    assert served.isdisjoint(prompts.keys)
    captions = {
        f"{shard}/{row['key']}": row["caption"]
        for shard in dataset.ledger
        for row in read_ledger(ledger_path(dataset.path, shard))
    }
    assert served | set(prompts.keys) == captions.keys()
    assert prompts.texts == [captions[key] for key in prompts.keys]


def test_a_checkpoint_and_an_export_know_their_run(run, tmp_path):
    expected = load_prompts("held-out", str(run))
    assert load_prompts("held-out", str(newest_checkpoint(run))) == expected
    (tmp_path / "latest").symlink_to(newest_checkpoint(run))
    assert load_prompts("held-out", str(tmp_path / "latest")) == expected
    shutil.copy(run / "config.json", tmp_path / TRAINING)
    assert load_prompts("held-out", str(tmp_path)) == expected


def test_a_dataset_that_has_moved_is_named_and_one_that_differs_refused(
    run, latent_dataset, tmp_path
):
    moved = tmp_path / "moved"
    shutil.copytree(latent_dataset, moved)
    expected = load_prompts("held-out", str(run))
    assert load_prompts(f"held-out:{moved}", str(run)) == expected
    for path in moved.rglob("00002.*"):
        path.unlink()
    assert status_of("index", moved) == 0
    assert sorted(Dataset(moved).ledger) == ["00000", "00001"]
    with pytest.raises(UserError, match=r"is not as .* was trained on"):
        load_prompts(f"held-out:{moved}", str(run))


def change_settings(run: Path, to: Path, **changes: Any) -> Path:
    record = json.loads((run / "config.json").read_text())
    record["settings"] |= changes
    to.mkdir()
    (to / "config.json").write_text(json.dumps(record))
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_samples": 2}, "is not as .* was trained on"),
        ({"seed": 1}, "is not as .* was trained on"),
        ({"online": "images/*.tar"}, "was trained on images"),
        ({"data": "nowhere"}, "nowhere: no latent dataset"),
        ({"resolution": 48}, "image column at 48 px"),
        ({"max_steps": 0}, "not settings of a run"),
    ],
)
def test_settings_that_do_not_belong_to_the_dataset_are_refused(run, tmp_path, changes, message):
    other = change_settings(run, tmp_path / "run", **changes)
    with pytest.raises(UserError, match=message):
        load_prompts("held-out", str(other))


def test_a_run_that_held_out_nothing_says_so(tmp_path, latent_dataset):
    run = run_on_dataset(tmp_path, latent_dataset, validation_samples=0)
    with pytest.raises(UserError, match=r"held out no samples \(--validation-samples 0\)"):
        load_prompts("held-out", str(run))


def test_a_run_that_followed_its_dataset_recorded_what_it_held_out(run, latent_dataset, tmp_path):
    following = change_settings(run, tmp_path / "run", follow=True)
    with pytest.raises(UserError, match=r"epochs\.jsonl: no epochs, which say"):
        load_prompts("held-out", str(following))
    line = {"held_out": {"00001": [0, 7], "00002": [3]}}
    (following / "epochs.jsonl").write_text(json.dumps(line) + "\n")
    prompts = load_prompts("held-out", str(following))
    assert [key.partition("/")[0] for key in prompts.keys] == ["00001", "00001", "00002"]


@pytest.mark.parametrize("text", [None, "{", "[1]", "{}", '{"settings": 3}'])
def test_a_folder_without_the_records_of_a_run_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"its training is not known|not the record of a run"):
        load_prompts("held-out", str(tmp_path))


def test_records_of_an_older_release_may_lack_settings_and_have_others(run, tmp_path):
    other = change_settings(run, tmp_path / "run", no_longer_a_setting=3)
    record = json.loads((other / "config.json").read_text())
    del record["settings"]["sample_steps"]
    (other / "config.json").write_text(json.dumps(record))
    assert TrainingRun(other).settings.sample_steps == 20
    assert (Path(TrainingRun(other).data.dataset.path) / MANIFEST).exists()
