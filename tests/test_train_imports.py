"""The trainer never loads an encoder or decodes an image; only its entry point may."""

import ast
import json
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_python
from helpers_train import flags, write_unet

LIBRARY = [path for path in sorted((REPOSITORY / "train").glob("*.py")) if path.stem != "main"]
FORBIDDEN = {
    *("transformers", "PIL", "webdataset", "torchvision", "cv2", "simplejpeg"),
    *("precompute", "evaluate", "examples", "benchmarks"),
}
FORBIDDEN_NAMES = {"AutoencoderKL", "StableDiffusionPipeline", "DiffusionPipeline"}


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Top-level packages and single names that a module imports, wherever it does so."""
    packages, names = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import fails in script mode"
            packages.add((node.module or "").split(".")[0])
            names |= {alias.name for alias in node.names}
    return packages, names


def test_the_check_sees_imports_inside_of_functions():
    packages, names = imports_of(REPOSITORY / "train" / "unet.py")
    assert {"torch", "diffusers", "json", "shards"} <= packages
    assert "UNet2DConditionModel" in names


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_no_module_of_the_trainer_imports_an_encoder_or_a_decoder(path):
    packages, names = imports_of(path)
    assert not packages & FORBIDDEN
    assert not names & FORBIDDEN_NAMES


def test_a_training_loads_neither_a_vae_nor_a_text_encoder(tmp_path, make_latent_dataset):
    data = make_latent_dataset(tmp_path / "latents", [12], dim=32, num_tokens=5).path
    argv = flags(
        unet=write_unet(tmp_path / "unet.json"),
        data=data,
        output_dir=tmp_path / "run",
        global_batch_size=4,
        max_steps=2,
        num_samples=0,
    )
    code = (
        "import json, sys\n"
        "from train.main import main\n"
        f"main({['tiny', *argv]!r})\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "diffusers.models.unets.unet_2d_condition" in loaded
    encoders = {name for name in loaded if "autoencoder" in name or "clip" in name.split(".")[-2:]}
    assert not encoders
    modelling = {name for name in loaded if name.startswith("transformers.models.")}
    assert not {name for name in modelling if ".modeling_" in name}
    assert not {
        name for name in loaded if name.startswith(("precompute", "evaluate", "webdataset"))
    }
