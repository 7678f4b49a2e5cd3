"""How a guidance sweep is run: the embedded default, and published protocols written down as data.

A protocol fixes what a figure must state to be comparable: how many images, of what size, by which
sampler in how many steps, at which guidance scales, through which networks. `sources` says where
each number is from; what is not published is said there as well. A flag overrules each of them, and
the result names the protocol's value beside the one that was used.
"""

from __future__ import annotations

from dataclasses import dataclass

TINY_CLIP = "examples/tiny-clip"
_MOSAIC = "github.com/mosaicml/diffusion at 49282fd"
_MLPERF = "github.com/mlcommons/training, retired_benchmarks/stable_diffusion"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of measuring.

    Args:
        about: in a line.
        num_images: at each guidance scale.
        side: of the images in pixels; 0: the U-Net's own.
        scheduler: a name of `SCHEDULERS`.
        num_steps: of it.
        scales: of classifier-free guidance.
        features: network of FID and KID.
        clip: of the CLIP score.
        max_fid: the target, where there is one; 0: none.
        min_clip_score: likewise, in hundredths of a cosine.
        sources: where each number is from.
    """

    about: str
    num_images: int
    side: int
    scheduler: str
    num_steps: int
    scales: tuple[float, ...]
    features: str
    clip: str
    max_fid: float = 0.0
    min_clip_score: float = 0.0
    sources: dict[str, str]


_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)

PROTOCOLS = {
    "scenes": Protocol(
        about="the embedded default: minutes on a laptop, comparable with nothing published",
        num_images=100,
        side=0,
        scheduler="dpm++",
        num_steps=20,
        scales=_SCALES,
        features=TINY_CLIP,
        clip=TINY_CLIP,
        sources={
            "scales": f"those of {_MOSAIC}",
            "num_images": "ours: what two CPU cores make in minutes",
            "num_steps": "ours: the default of `python -m evaluate sample`",
        },
    ),
    "coco-30k": Protocol(
        about="COCO-2014, 30,000 captions at 512 px, as the clean-fid curves of mosaicml/diffusion",
        num_images=30_000,
        side=512,
        scheduler="ddim",
        num_steps=50,
        scales=_SCALES,
        features="inception-2015-12-05.pt",
        clip="openai/clip-vit-base-patch16",
        sources={
            "num_images": f"{_MOSAIC}, issue 21: 30k COCO-2014 captions",
            "side": f"{_MOSAIC}, issue 21: 512",
            "scheduler": f"{_MOSAIC}: DDIM, stable_diffusion_2's inference scheduler",
            "num_steps": f"{_MOSAIC}: 50, the default of generate()",
            "scales": f"{_MOSAIC}, yamls/hydra-yamls/eval-clean-fid.yaml",
            "features": f"{_MOSAIC}, clean_fid_eval.py: clean-fid's compute_fid, mode clean",
            "clip": f"{_MOSAIC}, yamls/hydra-yamls/eval-clean-fid.yaml",
            "not published": "the FID itself is a picture of a curve in issue 21, without numbers",
        },
    ),
    "mlperf-sd2": Protocol(
        about="MLPerf Training's quality target for Stable Diffusion 2",
        num_images=30_000,
        side=512,
        scheduler="ddim",
        num_steps=50,
        scales=(8.0,),
        features="inception",
        clip="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        max_fid=90.0,
        min_clip_score=15.0,
        sources={
            "num_images": f"{_MLPERF}: 30k captions of COCO-2014 validation",
            "side": f"{_MLPERF}: 512",
            "scheduler": f"{_MLPERF}: DDIM",
            "num_steps": f"{_MLPERF}: 50",
            "scales": f"{_MLPERF}: 8",
            "features": f"{_MLPERF}: InceptionV3 of 2015, against val2014_30k_stats.npz",
            "clip": f"{_MLPERF}: OpenCLIP ViT-H-14, laion2b_s32b_b79k",
            "max_fid": f"{_MLPERF}: FID <= 90",
            "min_clip_score": f"{_MLPERF}: CLIP >= 0.15, here in hundredths",
        },
    ),
}
