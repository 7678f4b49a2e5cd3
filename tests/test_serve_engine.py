"""The engine with a real pipeline: the same image in any company, and nothing that is no image."""

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_serve import (
    HeldPipeline,
    build_config,
    build_pipeline,
    build_request,
    held_engine,
    pixels_of,
    save_pipeline,
    wait_until,
)

from evaluate.schedulers import SCHEDULERS
from serve.config import Limits
from serve.engine import Engine
from serve.job import NUM_SEEDS
from serve.refusal import RefusedError
from shards.errors import UserError

# Kernels sum in an order that depends on the batch's size: the last bits of float32 differ.
MAX_ROUNDING = 1


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(build_config(max_queue=64), lambda config, device: build_pipeline())
    engine.start()
    yield engine
    engine.close()


def test_batches_of_any_size_shape_and_steps_in_any_order_give_the_images_of_single_requests(
    engine,
):
    sizes, counts, steps = [(32, 32), (16, 48), (64, 24)], [1, 2, 4], [1, 2, 4]
    asked = [
        build_request(
            *[f"image {n}" for n in range(count)], seed=10 * count, width=w, height=h, steps=num
        )
        for (w, h) in sizes
        for count in counts
        for num in steps
    ]
    random.Random(0).shuffle(asked)
    jobs = [engine.submit(request) for request in asked[:12]]  # interleaved
    together = [job.future.result(60) for job in jobs]
    together += [engine.submit(request).future.result(60) for request in asked[12:]]  # in a row
    assert max(image.batch_size for images in together for image in images) > 1
    for request, images in zip(asked, together, strict=True):
        last = len(images) - 1
        single = replace(request, prompts=request.prompts[last:], seed=request.seed_of(last))
        (alone,) = engine.submit(single).future.result(60)
        assert alone.batch_size == 1
        pixels = pixels_of(images[last])
        assert pixels.shape == (request.kind.height, request.kind.width, 3)
        assert np.abs(pixels - pixels_of(alone)).max() <= MAX_ROUNDING


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_scheduler_gives_in_a_batch_what_it_gives_alone(engine, scheduler, steps):
    kind = {"scheduler": scheduler, "steps": steps, "width": 32, "height": 32}
    both = engine.submit(build_request("a", "b", seed=5, **kind)).future.result(60)
    (second,) = engine.submit(build_request("b", seed=6, **kind)).future.result(60)
    assert np.abs(pixels_of(both[1]) - pixels_of(second)).max() <= MAX_ROUNDING
    assert (pixels_of(both[0]) != pixels_of(both[1])).any()


@pytest.mark.parametrize("guidance", [1.0, 1.001, 20.0])
@pytest.mark.parametrize("scheduler", ["dpm++", "euler-a", "heun", "pndm", "unipc"])
def test_guidance_at_its_limits_gives_finite_images(engine, guidance, scheduler):
    request = build_request(
        "a", guidance=guidance, scheduler=scheduler, steps=12, width=16, height=16
    )
    assert engine.submit(request).future.result(60)[0].png


def test_the_image_is_the_one_that_the_pipeline_gives(engine):
    """And so the one of `python -m evaluate`, which calls it in the same way."""
    from evaluate.schedulers import build_scheduler

    pipeline = build_pipeline()
    pipeline.scheduler = build_scheduler("dpm++", pipeline.scheduler.config)
    (image,) = engine.submit(build_request("a red circle", seed=3, steps=3)).future.result(60)
    plain = pipeline(
        "a red circle",
        generator=torch.Generator("cpu").manual_seed(3),
        num_inference_steps=3,
        guidance_scale=2.0,
        output_type="np",
    ).images[0]
    assert np.abs(pixels_of(image) - (plain * 255).round()).max() <= MAX_ROUNDING


def test_the_largest_seed_is_followed_by_one_that_can_be_asked_for_again(engine):
    request = build_request("a", "b", seed=NUM_SEEDS - 1, steps=1, width=16, height=16)
    assert [request.seed_of(0), request.seed_of(1)] == [NUM_SEEDS - 1, 0]
    assert len(engine.submit(request).future.result(60)) == 2


def test_a_prompt_over_the_limit_is_cut_and_the_words_not_seen_are_named(engine):
    words = "lion " * 75 + "behind a fence"
    (image,) = engine.submit(build_request(words, steps=1)).future.result(60)
    (warning,) = image.warnings
    assert warning == "prompt has 84 tokens, 77 are used; not seen: 'behind a fence'"
    (exact,) = engine.submit(build_request("lion " * 75, steps=1)).future.result(60)
    assert exact.warnings == ()


def test_which_of_several_prompts_was_cut_is_said_and_so_is_the_negative_one(engine):
    long = "lion " * 90
    request = build_request("short", long, negative_prompt=long, steps=1)
    first, second = engine.submit(request).future.result(60)
    assert [warning.split(" has ")[0] for warning in first.warnings] == ["negative_prompt"]
    assert [warning.split(" has ")[0] for warning in second.warnings] == [
        "prompt[1]",
        "negative_prompt",
    ]


def test_a_negative_prompt_without_guidance_is_said_to_do_nothing(engine):
    request = build_request("a", negative_prompt="b", guidance=1.0, steps=1)
    assert "no effect" in engine.submit(request).future.result(60)[0].warnings[0]


# What goes wrong ----------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused_at_the_start():
    pipeline = build_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_in.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"^memory: .*not numbers; wanted finite weights"):
        Engine(build_config(), lambda config, device: pipeline).start()


def test_parts_that_do_not_fit_are_refused_at_the_start():
    from diffusers import UNet2DConditionModel

    pipeline = build_pipeline()
    config = {**pipeline.unet.config, "cross_attention_dim": 32}
    pipeline.unet = UNet2DConditionModel.from_config(config)
    with pytest.raises(UserError, match=r"^memory: does not generate \(mat1"):
        Engine(build_config(), lambda config, device: pipeline).start()


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "cpu,toaster", ""])
def test_a_device_that_is_not_there_is_refused_at_the_start(device):
    with pytest.raises(UserError, match=r"--devices: '(toaster|cuda:99|)' "):
        Engine(build_config(devices=device)).start()


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_side": 56}, "--max-side"),
        ({"min_side": 72}, "--min-side"),
        ({"max_steps": 1000}, None),
    ],
)
def test_limits_that_the_model_itself_is_outside_of_are_refused_at_the_start(limits, named):
    engine = Engine(build_config(limits=Limits(**limits)), lambda *_: HeldPipeline())
    if named is None:
        engine.start()
        engine.close()
    else:
        with pytest.raises(UserError, match=f"{named}.*wanted 64 and 64 within"):
            engine.start()


def test_an_image_that_is_not_finite_does_not_leave_and_spoils_no_other():
    with held_engine() as (engine, pipeline):
        pipeline.free = False
        blocker = engine.submit(build_request("blocker"))
        wait_until(lambda: pipeline.batches)
        good, bad = (engine.submit(build_request(prompt)) for prompt in ("good", "not finite"))
        pipeline.free = True
        pipeline.steps.release(10)
        assert blocker.future.result(20)
        assert good.future.result(20)[0].batch_size == 2
        with pytest.raises(RefusedError, match="not numbers") as refused:
            bad.future.result(20)
        assert (refused.value.status, refused.value.code) == (500, "not_finite")


def test_a_batch_that_the_device_has_no_memory_for_is_halved():
    with held_engine() as (engine, pipeline):
        pipeline.failing = lambda prompts: torch.OutOfMemoryError() if len(prompts) > 2 else None
        images = engine.submit(build_request(*"abcde")).future.result(20)
        assert sorted(image.batch_size for image in images) == [1, 2, 2, 2, 2]
        assert sorted(map(len, pipeline.batches)) == [1, 2, 2]
        assert engine.is_ready


def test_one_image_that_the_device_has_no_memory_for_is_refused():
    with held_engine() as (engine, pipeline):
        pipeline.failing = lambda prompts: torch.OutOfMemoryError()
        with pytest.raises(RefusedError, match="no memory for 64 x 64"):
            engine.submit(build_request("a")).future.result(20)


def test_a_request_that_fails_alone_does_not_make_the_device_a_failed_one():
    with held_engine() as (engine, pipeline):
        pipeline.failing = lambda prompts: RuntimeError("odd") if prompts == ["bad"] else None
        with pytest.raises(RuntimeError, match="odd"):
            engine.submit(build_request("bad")).future.result(20)
        assert engine.submit(build_request("good")).future.result(20)
        assert engine.is_ready


def test_a_device_that_fails_whatever_is_asked_is_told_until_it_works_again():
    with held_engine() as (engine, pipeline):
        pipeline.failing = lambda prompts: RuntimeError("lost")
        with pytest.raises(RuntimeError, match="lost"):
            engine.submit(build_request("a")).future.result(20)
        wait_until(lambda: not engine.is_ready)
        pipeline.failing = lambda prompts: None
        assert engine.submit(build_request("a")).future.result(20)
        wait_until(lambda: engine.is_ready)


# Giving up ----------------------------------------------------------------------------------------


def test_a_batch_that_nobody_waits_for_stops_at_the_end_of_its_step():
    with held_engine() as (engine, pipeline):
        pipeline.free = False
        job = engine.submit(build_request("a", steps=50))
        pipeline.steps.release(3)
        wait_until(lambda: pipeline.num_steps_done == 3)
        job.fail(TimeoutError())
        pipeline.free = True
        pipeline.steps.release(1)
        assert engine.submit(build_request("b", steps=1)).future.result(20)
        assert pipeline.num_steps_done <= 3 + 2 + 1


def test_a_batch_that_some_still_wait_for_goes_on():
    with held_engine() as (engine, pipeline):
        pipeline.free = False
        blocker = engine.submit(build_request("blocker"))
        wait_until(lambda: pipeline.batches)
        gone, waiting = engine.submit(build_request("a")), engine.submit(build_request("b"))
        pipeline.steps.release(3)
        wait_until(lambda: pipeline.num_steps_done == 3)
        gone.fail(TimeoutError())
        pipeline.steps.release(1)
        assert waiting.future.result(20)[0].batch_size == 2
        assert blocker.future.result(20)


def test_a_job_given_up_in_the_queue_frees_its_places_and_is_never_begun():
    with held_engine(max_queue=8) as (engine, pipeline):
        pipeline.free = False
        engine.submit(build_request("blocker"))
        wait_until(lambda: pipeline.batches)
        engine.submit(build_request(*"abcdefgh")).fail(TimeoutError())
        last = engine.submit(build_request(*"stuvwxyz"))
        pipeline.free = True
        pipeline.steps.release(10)
        assert len(last.future.result(20)) == 8
        assert not any("a" in batch for batch in pipeline.batches)


def test_draining_refuses_what_is_new_and_finishes_what_was_accepted():
    with held_engine() as (engine, pipeline):
        pipeline.free = False
        job = engine.submit(build_request("a"))
        engine.start_draining()
        assert not engine.is_ready
        with pytest.raises(RefusedError, match="shutting down") as refused:
            engine.submit(build_request("b"))
        assert refused.value.status == 503
        pipeline.steps.release(10)
        assert engine.drain(20)
        assert job.future.done()
        assert job.future.result()


def test_what_does_not_finish_while_draining_is_told_so():
    with held_engine() as (engine, pipeline):
        pipeline.free = False
        job = engine.submit(build_request("a"))
        assert not engine.drain(0.01)
        with pytest.raises(RefusedError, match="shutting down"):
            job.future.result(0)


def test_a_saved_pipeline_is_loaded_as_the_source(tmp_path):
    engine = Engine(build_config(source=str(save_pipeline(tmp_path / "pipeline"))))
    engine.start()
    assert engine.facts.width == 64
    assert engine.submit(build_request("a", steps=1)).future.result(60)
    engine.close()
