"""The scene grammar, its pictures and its shards: exact, reproducible, split by combination."""

import hashlib
import io
import itertools
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from examples.grammar import (
    COLOURS,
    HELD_OUT_FRAC,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    all_scenes,
    caption_of,
    parse_caption,
    sample_scene,
    split_of,
    words,
)
from examples.render import coverage, draw, place, render
from examples.scenes import SceneDataset, main, write_scenes


def scene_of(text: str) -> Scene:
    return parse_caption(text)


@pytest.mark.parametrize("grammar", ["single", "pairs"])
def test_captions_round_trip_over_the_whole_grammar(grammar):
    captions = set()
    for scene in all_scenes(grammar):
        caption = caption_of(scene)
        assert parse_caption(caption) == scene
        captions.add(caption)
    assert len(captions) == {"single": 336, "pairs": 55_104}[grammar]
    assert set(itertools.chain.from_iterable(map(str.split, captions))) <= set(words())


def test_captions_read_as_the_documentation_says():
    large_red = SceneObject(size="large", colour="red", shape="circle")
    small_blue = SceneObject(size="small", colour="blue", shape="square")
    single = Scene(objects=(large_red,), background="yellow")
    pair = Scene(objects=(large_red, small_blue), relation="above", background="orange")
    assert caption_of(single) == "a large red circle on a yellow background"
    assert (
        caption_of(pair) == "a large red circle above a small blue square on an orange background"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a large red circle",
        "a huge red circle on a yellow background",
        "a large red circle on a red background",
        "a large red circle above a large red circle on a blue background",
        "a large red circle above on a blue background",
        "a large red circle on a yellow background, please",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"caption|alike|own colour"):
        parse_caption(text)


@pytest.mark.parametrize("grammar", ["single", "pairs"])
def test_split_is_by_content_and_every_value_occurs_in_train(grammar):
    train_words, held_out, count = set(), 0, 0
    for scene in all_scenes(grammar):
        side = split_of(scene)
        assert side == split_of(scene.canonical()), "told from the other side, it changes sides"
        count += 1
        if side == "train":
            train_words |= {scene.relation, "on " + scene.background}
            for position, item in enumerate(scene.objects):
                train_words |= {(position, v) for v in (item.size, item.colour, item.shape)}
        else:
            held_out += 1
    assert abs(held_out / count - HELD_OUT_FRAC) < 0.03
    positions = range(1 if grammar == "single" else 2)
    assert train_words >= {"on " + colour for colour in COLOURS}
    assert train_words >= set(itertools.product(positions, (*SIZES, *COLOURS, *SHAPES)))
    assert grammar == "single" or train_words >= set(RELATIONS)


def test_split_is_the_same_for_ever():
    held_out = sorted(caption_of(s) for s in all_scenes("single") if split_of(s) == "held_out")
    digest = hashlib.sha256("\n".join(held_out).encode()).hexdigest()
    assert (len(held_out), digest[:16]) == (49, "96b0db9eea868af7"), (
        "another split: models trained before have seen what is now held out"
    )


def test_sampled_scenes_stay_on_their_side():
    rng = np.random.default_rng(0)
    for split in ("train", "held_out"):
        assert all(split_of(sample_scene("mixed", split, rng)) == split for _ in range(300))


def test_objects_stay_inside_apart_and_as_the_caption_says():
    rng = np.random.default_rng(1)
    for _ in range(400):
        scene = sample_scene("pairs", "train", rng)
        first, second = place(scene, rng)
        for box in (first, second):
            assert 0 < box.x - box.width / 2 < box.x + box.width / 2 < 1
            assert 0 < box.y - box.width / 2 < box.y + box.width / 2 < 1
            assert box.width * 64 >= 16
        dx, dy = second.x - first.x, second.y - first.y
        along, across = (dy, dx) if scene.relation in ("above", "below") else (dx, dy)
        assert (along > 0) == (scene.relation in ("above", "left of"))
        assert abs(along) > 2 * abs(across)
        assert abs(along) - (first.width + second.width) / 2 >= 0.059


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("resolution", [64, 256])
def test_drawn_area_is_that_of_the_ideal_shape(shape, resolution):
    (box,) = place(scene_of(f"a large red {shape} on a blue background"), np.random.default_rng(2))
    area = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}[shape] * box.width**2
    covered = coverage(shape, box, resolution)
    assert covered.mean() == pytest.approx(area, rel=0.01)
    assert ((covered > 0) & (covered < 1)).any(), "edges are anti-aliased"


def test_one_placement_looks_the_same_at_any_resolution():
    scene = scene_of("a small white triangle left of a large red circle on a green background")
    boxes = place(scene, np.random.default_rng(3))
    large = Image.fromarray(draw(scene, boxes, 256)).resize((64, 64), Image.Resampling.BOX)
    difference = np.abs(np.asarray(large, dtype=int) - draw(scene, boxes, 64).astype(int))
    assert difference.mean() < 1


def test_the_same_generator_state_gives_the_same_pixels_and_another_does_not():
    scene = scene_of("a small white triangle on a green background")
    pictures = [np.asarray(render(scene, np.random.default_rng(seed))) for seed in (5, 5, 6)]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


SMALL = SceneDataset(num_train=25, num_held_out=7, shard_size=10, grammar="mixed")


def test_shards_have_the_layout_of_img2dataset(tmp_path):
    write_scenes(tmp_path, SMALL)
    found = set(folder_bytes(tmp_path))
    names = [f"train/0000{i}" for i in range(3)] + ["held_out/00000"]
    endings = (".tar", ".parquet", "_stats.json")
    assert found == {"scenes.json"} | {name + ending for name in names for ending in endings}
    with tarfile.open(tmp_path / "train/00001.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
        assert all(member.mtime == 0 for member in tar)
    rows = pq.read_table(tmp_path / "train/00001.parquet").to_pylist()
    assert [row["key"] for row in rows] == [f"00001{i}" for i in range(10)]
    assert list(members) == [f"{r['key']}.{e}" for r in rows for e in ("jpg", "txt", "json")]
    for row in rows:
        image = members[f"{row['key']}.jpg"]
        assert json.loads(members[f"{row['key']}.json"]) == row
        assert members[f"{row['key']}.txt"].decode() == row["caption"]
        assert hashlib.sha256(image).hexdigest() == row["sha256"]
        assert Image.open(io.BytesIO(image)).size == (row["width"], row["height"]) == (64, 64)
        assert split_of(parse_caption(row["caption"])) == "train"
    stats = json.loads((tmp_path / "train/00002_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (5, 5, {"success": 5})


def test_the_default_shard_size_gives_keys_of_eight_digits_as_img2dataset_does(tmp_path):
    write_scenes(tmp_path, SceneDataset(num_train=2, num_held_out=0))
    with tarfile.open(tmp_path / "train/00000.tar") as tar:
        assert tar.getnames()[0] == "00000000.jpg"


def test_same_arguments_same_bytes_and_other_seeds_other_captions(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        dataset = SceneDataset(num_train=12, num_held_out=3, shard_size=5, seed=seed)
        write_scenes(tmp_path / name, dataset)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    captions = [
        pq.read_table(tmp_path / name / "train/00000.parquet")["caption"].to_pylist()
        for name in ("a", "c")
    ]
    assert captions[0] != captions[1]


def test_a_larger_data_set_begins_with_the_smaller_one(tmp_path):
    write_scenes(tmp_path / "a", SceneDataset(num_train=10, num_held_out=0, shard_size=5))
    write_scenes(tmp_path / "b", SceneDataset(num_train=20, num_held_out=0, shard_size=5))
    for name in ("train/00000.tar", "train/00001.tar"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_second_run_does_nothing_and_says_so(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--num-train", "4", "--num-held-out", "2"]
    assert main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_missing_shard_is_drawn_again_with_the_same_bytes(tmp_path):
    write_scenes(tmp_path, SMALL)
    before = folder_bytes(tmp_path)
    (tmp_path / "train/00001.tar").unlink()
    assert write_scenes(tmp_path, SMALL)
    assert folder_bytes(tmp_path) == before


def test_other_arguments_into_the_same_folder_are_refused(tmp_path, capsys):
    write_scenes(tmp_path, SMALL)
    before = folder_bytes(tmp_path)
    assert main(["--out", str(tmp_path), "--num-train", "3"]) == 1
    assert "choose another --out" in capsys.readouterr().err
    assert folder_bytes(tmp_path) == before


def test_shards_of_an_unfinished_other_run_are_not_mixed_in(tmp_path):
    write_scenes(tmp_path, SMALL)
    (tmp_path / "scenes.json").unlink()
    with pytest.raises(ValueError, match=r"00001\.tar: a shard that these arguments do not draw"):
        write_scenes(tmp_path, SceneDataset(num_train=5, num_held_out=5, shard_size=10))


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(tarfile.TarFile, "addfile", fail)
    with pytest.raises(OSError, match="disk full"):
        write_scenes(tmp_path, SMALL)
    assert folder_bytes(tmp_path) == {}


@pytest.mark.parametrize(
    "arguments",
    [["--resolution", "8"], ["--shard-size", "0"], ["--num-train", "-1"], ["--grammar", "triples"]],
)
def test_bad_arguments_end_in_one_line(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--out", str(tmp_path), *arguments])
    assert error.value.code == 2
    assert arguments[0].strip("-").replace("-", "_") in capsys.readouterr().err.replace("-", "_")


def test_help_needs_no_heavy_library():
    code = (
        "import sys, examples.scenes as s\n"
        "try: s.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=20)
