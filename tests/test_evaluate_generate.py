"""A folder of generated images: the same bytes whoever makes them, and however often it stops."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_generate import difference, untrained_run, wait_for
from helpers_train import Killed, contents_of, error_line, flags, run_torchrun, start
from PIL import Image

import evaluate.generate
from evaluate.__main__ import main
from evaluate.commands.generate import share_of
from evaluate.generate import GenerationSettings, generate_folder
from evaluate.generated import IMAGES, PROMPTS, SETTINGS, Generated, image_name
from evaluate.pipeline import load_pipeline
from evaluate.sample import generate
from shards.errors import UserError
from shards.storage import location

PROMPTS_OF_TEN = [f"a red circle number {number}" for number in range(9)] + [""]
SETTINGS_OF_ALL = GenerationSettings(num_steps=2, seed=7, batch_size=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pipeline(run: Path, model_folder: Path) -> Any:
    return load_pipeline(run, str(model_folder), device="cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pipeline: Any) -> Path:
    """What one process makes that nothing stops."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    make(pipeline, folder)
    return folder


def make(pipeline: Any, folder: Path, prompts: list[str] = PROMPTS_OF_TEN, **options: Any) -> Any:
    changes = {name: options.pop(name) for name in list(options) if hasattr(SETTINGS_OF_ALL, name)}
    return generate_folder(
        pipeline, prompts, folder, replace(SETTINGS_OF_ALL, **changes), **options
    )


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def image_path(folder: Path, number: int) -> Path:
    return folder / IMAGES / image_name(number)


# What is in the folder ----------------------------------------------------------------------------


def test_the_images_are_those_of_their_prompts_and_of_seed_plus_id(pipeline, whole):
    expected = generate(pipeline, PROMPTS_OF_TEN, seed=7, num_steps=2, batch_size=4)
    for number, pixels in enumerate(expected):
        with Image.open(image_path(whole, number)) as image:
            assert np.array_equal(np.asarray(image), pixels)
    rows = [json.loads(line) for line in (whole / PROMPTS).read_text().splitlines()]
    assert rows == [
        {"id": number, "prompt": prompt, "seed": 7 + number}
        for number, prompt in enumerate(PROMPTS_OF_TEN)
    ]
    assert sorted(path.name for path in whole.iterdir()) == [SETTINGS, IMAGES, PROMPTS]
    assert len(list((whole / IMAGES).iterdir())) == 10


def test_prompts_and_settings_are_complete_before_the_first_image(
    pipeline, whole, tmp_path, monkeypatch
):
    before = {}
    real = Generated.write_image

    def watch(self: Generated, number: int, pixels: np.ndarray) -> None:
        before[number] = [(tmp_path / "out" / name).read_bytes() for name in (SETTINGS, PROMPTS)]
        real(self, number, pixels)

    monkeypatch.setattr(Generated, "write_image", watch)
    make(pipeline, tmp_path / "out")
    assert before.keys() == set(range(10))
    final = [(whole / name).read_bytes() for name in (SETTINGS, PROMPTS)]
    assert all(found == final for found in before.values())


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_another_batch_size_changes_an_image_by_rounding_alone(
    pipeline, whole, tmp_path, batch_size
):
    other = make(pipeline, tmp_path / "out", batch_size=batch_size)
    for number in range(10):
        assert difference(other.read_image(number), Generated(whole).read_image(number)) <= 1


def test_strange_prompts_come_back_as_they_are(pipeline, tmp_path):
    prompts = ["line\nbreak", "a\u2028b\x85c", '"quoted" \\ tab\t', "日本語 🦁", " ", ""]
    generated = make(pipeline, tmp_path / "out", prompts, keys=["x/1"] * 6)
    assert Generated(tmp_path / "out").prompts == prompts
    assert {row["key"] for row in generated.rows} == {"x/1"}
    assert not generated.missing()


def test_images_are_read_in_the_order_of_their_ids_in_batches(whole):
    batches = list(Generated(whole).iter_images(4))
    assert [batch.shape for batch in batches] == [(4, 64, 64, 3), (4, 64, 64, 3), (2, 64, 64, 3)]
    assert {batch.dtype for batch in batches} == {np.dtype(np.uint8)}
    with Image.open(image_path(whole, 5)) as image:
        assert np.array_equal(batches[1][1], np.asarray(image))


def test_another_size_and_a_negative_prompt_are_made_as_asked(pipeline, tmp_path):
    plain = make(pipeline, tmp_path / "plain", width=48, height=32)
    assert plain.read_image(3).shape == (32, 48, 3)
    negative = make(
        pipeline, tmp_path / "negative", width=48, height=32, negative_prompt="a red circle"
    )
    assert difference(plain.read_image(3), negative.read_image(3)) > 2


def test_half_precision_starts_from_the_same_noise(run, model_folder, pipeline):
    half = load_pipeline(run, str(model_folder), device="cpu", dtype="bfloat16")
    assert half.unet.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16
    (exact,), (rounded,) = (
        generate(each, ["a red circle"], seed=7, num_steps=4) for each in (pipeline, half)
    )
    (another,) = generate(pipeline, ["a red circle"], seed=8, num_steps=4)
    error = np.abs(exact.astype(float) - rounded).mean()
    assert error < 0.2 * np.abs(exact.astype(float) - another).mean()


# Stopped and continued ----------------------------------------------------------------------------


def test_a_finished_folder_is_left_alone(pipeline, whole, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    monkeypatch.setattr(evaluate.generate, "sample_batch", None)  # is not called
    make(pipeline, whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.parametrize("lost", [[0], [9], [3, 4], [1, 5, 8], list(range(10))])
def test_missing_images_are_made_again_to_the_same_bytes_and_no_others(
    pipeline, whole, tmp_path, lost
):
    folder = copy_of(whole, tmp_path / "out")
    for number in lost:
        image_path(folder, number).unlink()
    kept = {n: image_path(folder, n).stat().st_ino for n in range(10) if n not in lost}
    make(pipeline, folder)
    assert contents_of(folder) == contents_of(whole)
    assert {n: image_path(folder, n).stat().st_ino for n in kept} == kept


def cut_off(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [cut_off, flip_a_bit, lambda data: b"", lambda data: b"not a PNG" * 99]
)
def test_a_damaged_image_is_refused_by_its_readers_and_made_anew(pipeline, whole, tmp_path, damage):
    folder, said = copy_of(whole, tmp_path / "out"), []
    path = image_path(folder, 6)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"000006\.png: not an image .*evaluate generate"):
        list(Generated(folder).iter_images(5))
    make(pipeline, folder, say=said.append)
    assert contents_of(folder) == contents_of(whole)
    assert said == ["1 images are damaged and are made anew"]


@pytest.mark.parametrize("die_at", [1, 4, 7, 10])
def test_a_process_that_dies_while_it_writes_leaves_nothing_that_counts(
    pipeline, whole, tmp_path, monkeypatch, die_at
):
    """Killed with half of a file written under its temporary name."""
    folder, written = tmp_path / "out", []
    real = Generated.write_image

    def die(self: Generated, number: int, pixels: np.ndarray) -> None:
        written.append(number)
        if len(written) == die_at:
            path = image_path(folder, number)
            path.parent.mkdir(exist_ok=True)
            path.with_name(path.name + ".partial").write_bytes(b"\x89PNG half")
            raise Killed
        real(self, number, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Generated, "write_image", die)
        with pytest.raises(Killed):
            make(pipeline, folder)
    assert len(Generated(folder).missing()) > 0
    make(pipeline, folder)
    assert contents_of(folder) == contents_of(whole)


def test_an_image_that_is_not_finite_names_its_prompt_and_is_not_written(
    pipeline, tmp_path, monkeypatch
):
    real = pipeline.vae.decode

    def decode(latents: torch.Tensor, **options: Any) -> Any:
        decoded = real(latents, **options)
        decoded[0][1, 0, 5, 5] = torch.nan
        return decoded

    monkeypatch.setattr(pipeline.vae, "decode", decode)
    with pytest.raises(UserError, match="prompt 'a red circle number 1': its image has pixels"):
        make(pipeline, tmp_path / "out")
    assert len(Generated(tmp_path / "out").missing()) == 10


def test_a_batch_that_memory_does_not_hold_is_one_line_with_the_remedy(
    pipeline, tmp_path, monkeypatch
):
    def allocate(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(evaluate.generate, "sample_batch", allocate)
    with pytest.raises(UserError, match=r"--batch-size 4: CUDA out of memory\. Remedy: a smaller"):
        make(pipeline, tmp_path / "out", batch_size=4)


# Several processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_processes_share_the_images_and_make_the_same_bytes(
    pipeline, whole, tmp_path, num_processes
):
    folder, seen = tmp_path / "out", set()
    for process in range(num_processes):
        make(pipeline, folder, process=process, num_processes=num_processes)
        there = Generated(folder).listed()
        assert seen <= there
        seen = there
    assert contents_of(folder) == contents_of(whole)


def test_parts_are_disjoint(pipeline, tmp_path):
    parts = [
        make(pipeline, tmp_path / str(part), process=part, num_processes=3).listed()
        for part in range(3)
    ]
    assert sorted(number for part in parts for number in part) == list(range(10))


@pytest.mark.parametrize(
    ("part", "rank", "world_size", "expected"),
    [
        ("", "0", "1", (0, 1)),
        ("", "2", "4", (2, 4)),
        ("3/16", "0", "1", (3, 16)),
        ("1/3", "1", "2", (3, 6)),
        ("0/1", "0", "1", (0, 1)),
    ],
)
def test_the_share_of_a_process(monkeypatch, part, rank, world_size, expected):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert share_of(part) == expected


@pytest.mark.parametrize("part", ["16/16", "-1/4", "3", "a/b", "1/0", "/", "1/2/3", "½/2"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(UserError, match=r"--part: .*wanted such as 3/16"):
        share_of(part)


# Folders of something else ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_steps": 3}, "num_steps 2 -> 3"),
        ({"guidance_scale": 5.0}, "guidance_scale 3.0 -> 5.0"),
        ({"guidance_rescale": 0.5}, "guidance_rescale 0.0 -> 0.5"),
        ({"negative_prompt": "dull"}, "negative_prompt '' -> 'dull'"),
        ({"width": 32}, "width 64 -> 32"),
        ({"batch_size": 5}, "batch_size 4 -> 5"),
        ({"seed": 8}, "seed 7 -> 8"),
        ({"prompts": PROMPTS_OF_TEN[:9]}, "prompts_sha256"),
        ({"prompts": [*PROMPTS_OF_TEN[:9], "another"]}, "prompts_sha256"),
    ],
)
def test_a_folder_of_other_settings_is_refused_and_left_as_it_is(pipeline, whole, changes, named):
    before = contents_of(whole)
    with pytest.raises(UserError, match=r"other settings: .*Remedy: another --out") as refusal:
        make(pipeline, whole, **changes)
    assert named in str(refusal.value)
    assert "source" not in str(refusal.value)
    assert contents_of(whole) == before


def test_the_same_size_said_in_words_is_the_same_setting(pipeline, whole):
    make(pipeline, whole, width=64, height=64, source="elsewhere")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_folder_of_other_weights_is_refused(pipeline, whole, part):
    weight = next(getattr(pipeline, part).parameters())
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.view(-1)[0] += 1e-6
        with pytest.raises(UserError, match=f"{part}_sha256 '?[0-9a-f]{{12}}… -> "):
            make(pipeline, whole)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    make(pipeline, whole)


def test_a_folder_of_another_sampler_is_refused(run, model_folder, whole):
    other = load_pipeline(run, str(model_folder), device="cpu", scheduler="euler")
    with pytest.raises(UserError, match=r"scheduler 'DPMSolver.*-> 'EulerDiscreteScheduler'"):
        make(other, whole)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SETTINGS).unlink(), f"has {IMAGES}/ but no {SETTINGS}"),
        (lambda folder: (folder / SETTINGS).write_text("{"), "not a folder of generated images"),
        (lambda folder: (folder / SETTINGS).write_text("[]"), "not a folder of generated images"),
        (lambda folder: (folder / PROMPTS).write_text("{}\n"), "is not as it was written"),
    ],
)
def test_a_folder_whose_records_are_damaged_is_refused(pipeline, whole, tmp_path, damage, message):
    folder = copy_of(whole, tmp_path / "out")
    damage(folder)
    with pytest.raises(UserError, match=message):
        make(pipeline, folder)


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", '{"id": 1, "prompt": "a"}\n', "{"])
def test_prompts_that_are_none_are_refused_by_readers(whole, tmp_path, text):
    folder = copy_of(whole, tmp_path / "out")
    (folder / PROMPTS).write_text(text)
    with pytest.raises(UserError, match="not a folder of generated images"):
        _ = Generated(folder).prompts


def test_files_of_other_names_are_no_images(pipeline, whole, tmp_path):
    folder = copy_of(whole, tmp_path / "out")
    path = image_path(folder, 6)
    for name in ("6.png", "000006", "000006.png.partial", "000010.png", "00006²"):
        (folder / IMAGES / name).write_bytes(path.read_bytes())
    path.unlink()
    assert Generated(folder).missing() == [6]
    assert Generated(folder).listed() == set(range(10)) - {6}
    make(pipeline, folder)
    assert path.read_bytes() == image_path(whole, 6).read_bytes()


def test_readers_of_an_unfinished_folder_are_told_what_is_missing(whole, tmp_path):
    folder = copy_of(whole, tmp_path / "out")
    for number in (2, 7):
        image_path(folder, number).unlink()
    assert Generated(folder).missing() == [2, 7]
    with pytest.raises(UserError, match=r"2 of 10 images missing \(first 2\)"):
        next(Generated(folder).iter_images(4))


def test_a_folder_behind_a_url_is_made_and_continued(pipeline, whole):
    folder = location("memory://generated/out")
    make(pipeline, folder, process=0, num_processes=2)
    assert Generated(folder).missing() == [4, 5, 6, 7]
    make(pipeline, folder)
    for number in range(10):
        data = (folder / IMAGES / image_name(number)).read_bytes()
        assert data == image_path(whole, number).read_bytes()


# The command --------------------------------------------------------------------------------------


def arguments(run: Path, model: Path, out: Path, **settings: Any) -> list[str]:
    named = {"source": run, "model": model, "out": out, "num_steps": 2, "batch_size": 4, "seed": 7}
    return ["generate", *flags(**(named | settings))]


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS_OF_TEN))
    return path


def test_the_command_makes_what_the_function_makes(
    run, model_folder, whole, prompt_file, tmp_path, capsys
):
    main(arguments(run, model_folder, tmp_path / "out", prompts=prompt_file))
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'out'}: 10 of 10 images"
    theirs, ours = contents_of(tmp_path / "out"), contents_of(whole)
    assert {name: theirs[name] for name in ours if name != SETTINGS} == {
        name: data for name, data in ours.items() if name != SETTINGS
    }
    assert json.loads(theirs[SETTINGS])["source"] == str(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "--num-steps: 0; wanted at least 1"),
        ({"guidance_rescale": 2}, "--guidance-rescale: 2.0; wanted 0 to 1"),
        ({"guidance_scale": "nan"}, "--guidance-scale: nan"),
        ({"guidance_scale": 1, "negative_prompt": "x"}, "negative prompt: has no effect"),
        ({"height": -8}, "--height: -8"),
        ({"batch_size": 0}, "--batch-size: 0"),
        ({"seed": -1}, "--seed: -1"),
        ({"seed": 2**64}, "--seed: 18446744073709551616; wanted 0 to"),
        ({"num_images": -1}, "--num-images: -1"),
        ({"scheduler": "k"}, "scheduler: 'k'; wanted one of dpm++"),
        ({"prompts": "gone.txt"}, "--prompts: no file gone.txt"),
        ({"part": "2/2"}, "--part: 2/2"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_makes_no_folder(
    run, model_folder, tmp_path, capsys, changes, message
):
    argv = arguments(run, model_folder, tmp_path / "out", **({"prompts": "a; b"} | changes))
    line = error_line(capsys, lambda: main(argv))
    assert line.startswith(f"evaluate: error: {message}")
    assert not (tmp_path / "out").exists()


def test_more_steps_than_timesteps_are_refused(pipeline, tmp_path):
    with pytest.raises(UserError, match="--num-steps: 1001; wanted at most 1000"):
        make(pipeline, tmp_path / "out", num_steps=1001)


def test_a_process_that_died_before_the_prompts_were_written_is_continued(
    pipeline, whole, tmp_path
):
    (tmp_path / "out").mkdir()
    shutil.copy(whole / SETTINGS, tmp_path / "out")
    make(pipeline, tmp_path / "out")
    assert contents_of(tmp_path / "out") == contents_of(whole)


@pytest.mark.parametrize("size", [{"width": 60}, {"height": 4}, {"width": 64, "height": 63}])
def test_a_size_that_the_vae_has_no_latents_of_is_refused(pipeline, tmp_path, size):
    with pytest.raises(UserError, match=r"--(width|height): \d+; wanted a multiple of 8"):
        make(pipeline, tmp_path / "out", **size)
    assert not (tmp_path / "out").exists()


def test_long_prompts_are_counted(run, model_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n" + "blue square " * 100 + "\n")
    main(arguments(run, model_folder, tmp_path / "out", prompts=prompts))
    assert "1 of 2 prompts are cut" in capsys.readouterr().err


def test_two_processes_of_torchrun_make_the_bytes_of_one(
    run, model_folder, whole, prompt_file, tmp_path
):
    script = tmp_path / "generate.py"
    script.write_text("import sys\nfrom evaluate.__main__ import main\nmain(sys.argv[1:])\n")
    run_torchrun(script, *arguments(run, model_folder, tmp_path / "out", prompts=prompt_file))
    ours, theirs = contents_of(whole / IMAGES), contents_of(tmp_path / "out" / IMAGES)
    assert ours == theirs


def test_kill_9_in_the_middle_and_the_same_command_again(run, model_folder, pipeline, tmp_path):
    prompts = [f"a blue square number {number}" for number in range(48)]
    named = tmp_path / "prompts.txt"
    named.write_text("\n".join(prompts))
    argv = arguments(run, model_folder, tmp_path / "out", prompts=named)
    process = start("-m", "evaluate", *argv)
    try:
        wait_for(lambda: image_path(tmp_path / "out", 9).exists() or process.poll() is not None)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    stopped = Generated(tmp_path / "out")
    assert 0 < len(stopped.missing()) < 48
    assert all(stopped.is_intact(number) for number in stopped.listed())
    main(argv)
    expected = make(pipeline, tmp_path / "expected", prompts)
    assert contents_of(tmp_path / "out" / IMAGES) == contents_of(expected.folder / IMAGES)
