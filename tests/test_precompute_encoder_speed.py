"""What makes the encoders fast changes nothing but rounding: compiled, without masks or waits."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NUM_SHARDS, TINY_MODEL, smooth_image
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from helpers_train import flags, metrics_of, write_unet
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from precompute.compilation import compile_encode, even_batch_size, filled_up
from precompute.compile_choice import is_compiled
from precompute.config import PrecomputeConfig
from precompute.encoded_text import EncodedText
from precompute.image_encoder import ImageEncoder, encode_pixels, finite_samples
from precompute.job import precompute
from precompute.model_folder import ModelFolder, find_model
from precompute.online_encoders import Encoders, online_columns
from precompute.text_encoder import TextEncoder
from shards.dataset import Dataset
from shards.errors import UserError
from shards.held_out import choose_held_out
from shards.reader import LatentReader
from shards.receipt import read_receipt
from shards.source_shard import SourceShard
from train.main import main

CPU = torch.device("cpu")
CAPTIONS = ["a red circle above a blue square", "a lion", "circle " * 99, "42 + naïve ❤", ""]


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Two text encoders, one that projects; an autoencoder with attention, as published ones."""
    folder = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("fast") / "model"))
    tokenizer = CLIPTokenizer.from_pretrained(TINY_MODEL / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer_2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for part, kind in (
            ("text_encoder", CLIPTextModel),
            ("text_encoder_2", CLIPTextModelWithProjection),
        ):
            config = CLIPTextConfig(
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=2,
                projection_dim=24,
            )
            shutil.rmtree(folder / part, ignore_errors=True)
            kind(config).save_pretrained(folder / part)
        replace_autoencoder(
            folder,
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(4, 8),
                norm_num_groups=4,
            ),
        )
    return folder


def replace_autoencoder(folder: Path, autoencoder: Any) -> None:
    shutil.rmtree(folder / "vae")
    autoencoder.save_pretrained(folder / "vae")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, and nothing left behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that are compiled from here on; they run as they are, operator by operator."""
    found: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    return found


class Operators(TorchDispatchMode):
    """Every operator that runs, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func.overloadpacket.__name__, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [args for called, args, _ in self.calls if called == name]

    def counts(self) -> Counter[str]:
        return Counter(name for name, *_ in self.calls)


WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}


def pixel_values(count: int, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(7)) * 2 - 1


def text_encoder(folder: Path, part: str, hidden_state: Any, size: int | None = None) -> Any:
    model = find_model(str(folder))
    options = {"hidden_state": hidden_state, "compiled_batch_size": size}
    return TextEncoder(model, CPU, torch.float32, part, **options)


TEXTS = [
    ("text_encoder", "last"),
    ("text_encoder", "penultimate"),
    ("text_encoder_2", "last"),
    ("text_encoder_2", "penultimate"),
]


def assert_equal_states(found: Any, wanted: Any) -> None:
    assert found.states.shape == wanted.states.shape
    torch.testing.assert_close(found.states, wanted.states, rtol=1e-5, atol=1e-5)
    assert (found.pooled is None) == (wanted.pooled is None)
    if wanted.pooled is not None:
        torch.testing.assert_close(found.pooled, wanted.pooled, rtol=1e-5, atol=1e-5)


# Text encoders ------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_text_encoder_gives_the_same_states(sdxl_folder):
    eager = text_encoder(sdxl_folder, "text_encoder_2", "penultimate")
    compiled = text_encoder(sdxl_folder, "text_encoder_2", "penultimate", size=2)
    ids = eager.tokenize(CAPTIONS)
    for count in (2, 1, 5):  # full, partly filled, and more than a batch
        assert_equal_states(compiled.encode(ids[:count]), eager.encode(ids[:count]))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(("part", "hidden_state"), TEXTS)
def test_one_graph_serves_captions_of_any_number(sdxl_folder, graphs, part, hidden_state):
    eager = text_encoder(sdxl_folder, part, hidden_state)
    compiled = text_encoder(sdxl_folder, part, hidden_state, size=3)
    ids = eager.tokenize(CAPTIONS * 3)
    for count in (3, 1, 2, 7, 15, 3):
        assert_equal_states(compiled.encode(ids[:count]), eager.encode(ids[:count]))
    assert len(graphs) == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_what_a_batch_is_filled_up_with_changes_no_caption(sdxl_folder, graphs):
    compiled = text_encoder(sdxl_folder, "text_encoder", "last", size=4)
    ids = compiled.tokenize(CAPTIONS)
    alone, filled = compiled.encode(ids[:1]).states, compiled.encode(ids[[0, 1, 1, 1]]).states
    assert torch.equal(alone[0], filled[0])


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_attention_over_captions_is_causal_without_a_mask_in_memory(sdxl_folder, graphs, part):
    eager, compiled = (text_encoder(sdxl_folder, part, "last", size) for size in (None, 2))
    ids = eager.tokenize(CAPTIONS[:2])
    with Operators() as operators:
        eager.encode(ids)
    attended = operators.named("scaled_dot_product_attention")
    assert len(attended) == 3  # one in a layer: no eager attention
    assert all(args[3:] == (None, 0.0, True) for args in attended)
    assert not {"softmax", "_softmax", "bmm", "where", "masked_fill"} & set(operators.counts())
    compiled.encode(ids)
    nodes = [node for node in graphs[0].graph.nodes if "scaled_dot" in str(node.target)]
    assert len(nodes) == 3
    for node in nodes:
        assert node.kwargs["is_causal"] is True
        assert node.kwargs.get("attn_mask") is None
        assert len(node.args) == 3


def test_no_release_of_torch_makes_the_compiled_encoder_build_a_mask(
    sdxl_folder, graphs, monkeypatch
):
    """Some tell a library that is compiled that it is exported; it then plays safe."""
    compiled = text_encoder(sdxl_folder, "text_encoder", "last", size=2)
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    compiled.encode(compiled.tokenize(CAPTIONS[:2]))
    assert not [node for node in graphs[0].graph.nodes if "mask" in node.name]


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_token_is_seen_by_the_later_ones_alone_and_padding_as_any_other(sdxl_folder, part):
    encoder = text_encoder(sdxl_folder, part, "last")
    ids = encoder.tokenize(["a red circle above a blue square"] * 2)
    assert ids[1, 5] != ids[1, 2]
    ids[1, 5] = ids[1, 2]
    first, second = encoder.encode(ids).states
    changed = (first - second).abs().amax(dim=1) > 1e-6
    assert not changed[:5].any()
    assert changed[5:].all()  # to the last position, far behind the end of the caption


def test_states_of_captions_are_taken_without_waiting_for_the_device(sdxl_folder):
    encoder = text_encoder(sdxl_folder, "text_encoder_2", "penultimate")
    ids = encoder.tokenize(CAPTIONS)
    with Operators() as operators:
        encoder.encode(ids)
    assert not WAITS & set(operators.counts())
    copies = [args for name, args, _ in operators.calls if name == "copy_"]
    assert all(args[0].dtype == torch.int64 for args in copies)  # the ids, filled in on the host


def test_hidden_states_can_be_asked_for_in_a_fresh_process(sdxl_folder, graphs):
    """The library puts in hooks under a lock when it is first asked; a graph would break there."""
    compiled = text_encoder(sdxl_folder, "text_encoder", "penultimate", size=2)
    compiled.encode(compiled.tokenize(CAPTIONS[:1]))
    assert len(graphs) == 1


# Autoencoders -------------------------------------------------------------------------------------


def tiny_autoencoder() -> Any:
    channels = (8, 8, 8)
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )


def deep_autoencoder() -> Any:
    layers: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        layers[f"{half}_block_out_channels"] = (8, 8, 16, 16)
        layers[f"{half}_layers_per_block"] = (1, 1, 1, 1)
        layers[f"{half}_qkv_multiscales"] = ((), (), (), (5,))
        layers[f"{half}_block_types"] = ("ResBlock",) * 3 + ("EfficientViTBlock",)
    return AutoencoderDC(latent_channels=8, attention_head_dim=8, **layers)


@pytest.fixture(params=["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"])
def any_model(request: pytest.FixtureRequest, sdxl_folder: Path, tmp_path: Path) -> ModelFolder:
    """A folder with an autoencoder of each class."""
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    builders = {"AutoencoderTiny": tiny_autoencoder, "AutoencoderDC": deep_autoencoder}
    if builder := builders.get(request.param):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            replace_autoencoder(folder, builder())
    return find_model(str(folder))


def test_one_graph_for_each_shape_serves_images_of_any_number(any_model, graphs):
    eager = ImageEncoder(any_model, CPU, torch.float32)
    compiled = ImageEncoder(any_model, CPU, torch.float32, compiled_batch_size=3)
    for side in (16, 32, 16):
        for count in (3, 1, 2):
            found, wanted = (each.launch(pixel_values(count, side)) for each in (compiled, eager))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    assert len(graphs) == counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_half_precision_is_one_graph_as_well(sdxl_folder, graphs):
    model = find_model(str(sdxl_folder))
    eager = ImageEncoder(model, CPU, torch.float16)
    compiled = ImageEncoder(model, CPU, torch.float16, compiled_batch_size=3)
    for count in (3, 1):
        found, wanted = (each.launch(pixel_values(count)) for each in (compiled, eager))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
    assert len(graphs) == 1


def test_pixels_of_any_order_in_memory_are_one_shape_to_the_compiler(sdxl_folder, graphs):
    compiled = ImageEncoder(find_model(str(sdxl_folder)), CPU, torch.float32, compiled_batch_size=2)
    pixels = pixel_values(2)
    given = compiled._encoder_input(pixels)
    assert given.is_contiguous(memory_format=torch.channels_last)
    found = [
        compiled.launch(each)
        for each in (
            pixels,
            pixels.contiguous(memory_format=torch.channels_last),
            pixels.expand(2, 2, 3, 32, 32)[0],
        )
    ]
    assert all(torch.equal(each, found[0]) for each in found)
    assert len(graphs) == 1


def test_the_autoencoder_stays_channels_last_and_its_attention_is_one_operator(sdxl_folder):
    encoder = ImageEncoder(find_model(str(sdxl_folder)), CPU, torch.float32)
    pixels = pixel_values(2).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), Operators() as operators:
        encode_pixels(encoder._autoencoder, pixels)
    convolutions = [args[0] for args in operators.named("conv2d")]
    assert len(convolutions) > 10
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in convolutions)
    copies = ("clone", "contiguous", "_to_copy")
    moved = [args[0].shape for name in copies for args in operators.named(name)]
    assert [shape for shape in moved if len(shape) == 4] == []
    assert len(operators.named("scaled_dot_product_attention")) == 1
    assert not {"softmax", "_softmax", "bmm"} & set(operators.counts())


# The parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_batch_is_filled_up_with_its_last_sample_whatever_was_there(length):
    batch = torch.arange(length * 6, dtype=torch.float32).view(length, 2, 3)
    like = torch.full((5, 2, 3), float("nan"), dtype=torch.bfloat16)
    found = filled_up(batch, like)
    assert found is like
    assert torch.equal(found[:length], batch.bfloat16())
    assert (found[length:] == batch[-1].bfloat16()).all()


@pytest.mark.parametrize("at_most", [1, 2, 32, 64])
def test_batches_of_even_size_are_few_and_nearly_full(at_most):
    for num_rows in range(1, 300):
        size = even_batch_size(num_rows, at_most)
        num_batches = -(-num_rows // at_most)
        assert 1 <= size <= at_most
        assert num_rows <= size * num_batches < num_rows + num_batches


def test_what_would_break_the_graph_is_one_line_for_the_user():
    def breaking(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(UserError, match=r"^--compile of an encoder: .*graph_break"):
        compile_encode(breaking)(torch.zeros(1))


def test_a_device_without_memory_is_not_the_compilers_fault(monkeypatch):
    """The worker answers it with --batch-size."""

    def run_out(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda *_: run_out))
    with pytest.raises(torch.OutOfMemoryError):
        compile_encode(lambda x: x + 1)(torch.zeros(2))


# A job --------------------------------------------------------------------------------------------


def job(out: Path, images: Path, model: Path, shards: str, **options: Any) -> dict[str, bytes]:
    """Run it; the data files that it wrote."""
    settings: dict[str, Any] = {"resolutions": "32", "device": "cpu", "batch_size": 8}
    places = {"shards": f"{images}/{shards}.tar", "out": str(out), "model": str(model)}
    precompute(PrecomputeConfig(**settings | places | options))
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.suffix in (".safetensors", ".parquet")
    }


def test_a_compiled_job_that_was_interrupted_writes_the_bytes_of_one_that_was_not(
    model_folder, image_shards, tmp_path, graphs
):
    whole = job(tmp_path / "whole", image_shards, model_folder, "*", compile="on")
    assert len(graphs) == 2  # the autoencoder's, and the text encoder's
    job(tmp_path / "parts", image_shards, model_folder, "00001", compile="on")
    parts = job(tmp_path / "parts", image_shards, model_folder, "*", compile="on")
    assert len(whole) == 3 * NUM_SHARDS + 1  # ledger, moments, states; the empty caption's
    assert parts == whole


def test_a_compiled_job_without_states_loads_and_compiles_no_text_encoder(
    model_folder, image_shards, tmp_path, graphs
):
    job(tmp_path / "ids", image_shards, model_folder, "00000", compile="on", text="ids")
    assert len(graphs) == 1


def test_a_job_on_a_cpu_compiles_nothing_unless_it_is_told_to(
    model_folder, image_shards, tmp_path, graphs
):
    job(tmp_path / "out", image_shards, model_folder, "00000")
    assert graphs == []


@pytest.mark.parametrize(("choice", "is_named"), [("on", True), ("off", False)])
def test_receipts_say_whether_the_encoders_were_compiled(
    model_folder, image_shards, tmp_path, graphs, choice, is_named
):
    job(tmp_path / "out", image_shards, model_folder, "00000", compile=choice)
    receipts = [
        read_receipt(path)
        for path in (tmp_path / "out").rglob("*.json")
        if path.name in ("00000.json", "null.json")
    ]
    assert len(receipts) == 4  # ledger, moments, states; the empty caption's
    assert {"inductor" in receipt.versions for receipt in receipts} == {is_named}


CUDA, LARGE = ["cuda:0", "cuda:1"], 2 * 10**10  # bytes of a shard; two are a large job


@pytest.mark.parametrize(
    ("devices", "lengths", "triton", "settings", "expected"),
    [
        (CUDA, [LARGE, LARGE], True, {}, True),
        (CUDA, [LARGE, LARGE], True, {"shard_range": "0:1", "workers": 7}, True),
        (CUDA, [LARGE], True, {}, False),
        (CUDA, [10, None], True, {}, True),  # a pipe's: nobody knows
        (CUDA, [LARGE, LARGE], True, {"bucket_step": 64}, False),
        (CUDA, [LARGE, LARGE], True, {"compile": "off"}, False),
        (CUDA, [LARGE, LARGE], False, {}, False),
        (["cpu"], [LARGE, LARGE], True, {}, False),
        (["cpu"], [10], False, {"compile": "on"}, True),
        (CUDA, [10], False, {"compile": "on", "bucket_step": 64}, True),
    ],
)
def test_what_is_compiled_by_itself_depends_on_the_command_and_the_machine_alone(
    monkeypatch, devices, lengths, triton, settings, expected
):
    monkeypatch.setattr("precompute.compile_choice.find_spec", lambda _: triton or None)
    sources = [SourceShard(f"{n}.tar", f"{n}", length) for n, length in enumerate(lengths)]
    config = PrecomputeConfig(shards="*.tar", **settings)
    assert is_compiled(config, devices, sources) is expected


# Beside the trainer -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids_dataset(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, image_shards: Path
) -> Dataset:
    out = tmp_path_factory.mktemp("ids") / "latents"
    job(out, image_shards, model_folder, "*", text="ids")
    return Dataset(out)


def source(dataset: Dataset, share: int | None) -> EncodedText:
    image, text = dataset.image_column(32), dataset.text_column()
    order = {"seed": 3, "global_batch_size": 8, "num_partitions": 4}
    held_out = choose_held_out(dataset, image, 3)
    reader = LatentReader(dataset, image, text, held_out=held_out, **order)
    return EncodedText(reader, text, device=CPU, compiled_share=share)


def test_states_beside_the_trainer_are_the_same_from_one_graph(ids_dataset, graphs):
    eager, compiled = (source(ids_dataset, share) for share in (None, 8))
    np.testing.assert_allclose(compiled.null_states, eager.null_states, atol=1e-3)
    batches = zip(compiled.iter_batches(2, range(8)), eager.iter_batches(2, range(8)), strict=False)
    for found, wanted in islice(batches, 4):
        assert found.samples.tolist() == wanted.samples.tolist()
        assert found.states.dtype == torch.float16
        assert not found.states.is_inference()  # autograd would not save such a one
        torch.testing.assert_close(found.states, wanted.states, rtol=2**-10, atol=1e-4)
    for found, wanted in zip(*(s.iter_held_out(0, 3, 2) for s in (compiled, eager)), strict=True):
        torch.testing.assert_close(found.states, wanted.states, rtol=2**-10, atol=1e-4)
    assert len(graphs) == 1
    assert eager.identity == compiled.identity


def test_losses_beside_a_compiled_text_encoder_are_the_same(
    ids_dataset, tmp_path, graphs, monkeypatch
):
    def losses(name: str) -> list[float]:
        settings: dict[str, Any] = {
            "unet": write_unet(tmp_path / "unet.json", cross_attention_dim=128),
            "data": ids_dataset.path,
            "output_dir": tmp_path / name,
            "resolution": 32,
            **{"global_batch_size": 8, "max_steps": 3, "log_every": 1, "warmup_steps": 0},
            **{"num_samples": 0, "validation_samples": 0, "compile": "off"},
        }
        main(["tiny", *flags(**settings)])
        return [row["train/loss"] for row in metrics_of(tmp_path / name)]

    eager = losses("eager")
    # As with --compile, which would compile the U-Net as well: for half a minute.
    monkeypatch.setattr("train.main._compiled_share", lambda config, accelerator: 8)
    assert losses("compiled") == pytest.approx(eager, rel=1e-4)
    assert len(graphs) == 1


def test_a_step_takes_its_states_without_waiting(ids_dataset):
    batches = source(ids_dataset, None).iter_batches(0, range(8))
    next(batches)
    with Operators() as operators:
        next(batches)
    assert not WAITS & set(operators.counts())


def squares(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.asarray(smooth_image(rng, 32, 32)) for _ in range(count)]


def test_online_encoders_give_the_same_from_a_graph_each(sdxl_folder, graphs):
    columns = online_columns(str(sdxl_folder), 32, CPU)
    eager, compiled = Encoders(*columns, CPU), Encoders(*columns, CPU, compiled_share=37)
    for count in (37, 5):
        pictures, captions = squares(count), [f"a lion number {n}" for n in range(count)]
        found = compiled.encode_images(pictures), compiled.encode_texts(captions)
        wanted = eager.encode_images(pictures), eager.encode_texts(captions)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert not any(tensor.is_inference() for tensor in found)
    assert len(graphs) == 2


@pytest.mark.parametrize("share", [None, 6])
def test_what_overflows_online_is_found_in_one_look_and_encoded_exactly(
    sdxl_folder, graphs, monkeypatch, share
):
    image, text = online_columns(str(sdxl_folder), 32, CPU)
    exact = Encoders(image, text, CPU)
    halves = replace(image, spec=replace(image.spec, compute_dtype="float16"))
    half = Encoders(halves, text, CPU, compiled_share=share)
    pictures = squares(70)
    wanted = exact.encode_images(pictures)
    launch, launched = half._image_encoder.launch, [0]

    def overflowing(pixels: torch.Tensor) -> torch.Tensor:
        latents = launch(pixels).clone()
        for row in (0, 33, 69):
            if launched[0] <= row < launched[0] + len(latents):
                latents[row - launched[0], 0, 0, 0] = float("inf")
        launched[0] += len(latents)
        return latents

    looks: list[int] = []

    def look(latents: torch.Tensor) -> torch.Tensor:
        looks.append(len(latents))
        return finite_samples(latents)

    monkeypatch.setattr(half._image_encoder, "launch", overflowing)
    monkeypatch.setattr("precompute.online_encoders.finite_samples", look)
    found = half.encode_images(pictures)
    assert looks == [70]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05)
    rows = [0, 33, 69]
    torch.testing.assert_close(found[rows], wanted[rows], rtol=1e-4, atol=1e-4)
