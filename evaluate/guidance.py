"""A guidance sweep: the same prompts and seeds at several scales, and what each is worth.

With more guidance pictures follow their captions more closely and vary less: CLIP score and FID
move against each other, and the curve of one against the other is what models are compared by.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from evaluate.clip import Clip
from evaluate.feature_networks import FeatureNetwork
from evaluate.generate import GenerationSettings, generate_folder
from evaluate.generated import Generated
from evaluate.metrics import collect_features, measure
from evaluate.pictures import Pictures
from evaluate.reference import Reference
from examples.scene_reader import score
from shards.storage import Location

_POLL_SEC = 2.0
_BATCH_SIZE = 64


@dataclass(frozen=True)
class Sweep:
    """What is generated, and where.

    Args:
        prompts: one for each image of a scale.
        scales: of guidance.
        settings: of all images but for the scale.
        out: gets a folder of images for each scale.
        keys: of the prompts in their source; see `evaluate.prompts.Prompts`.
        process: which process this is of `num_processes` that share the generating.
        num_processes: see above.
        say: is told what is under way.
    """

    prompts: Sequence[str]
    scales: Sequence[float]
    settings: GenerationSettings
    out: Location
    keys: Sequence[str] = ()
    process: int = 0
    num_processes: int = 1
    say: Callable[[str], object] = print

    def folder(self, scale: float) -> Location:
        """Of the images of one scale."""
        return self.out / f"guidance-{scale:g}"

    def generate(self, pipeline: Any) -> list[Generated]:
        """Make this process's share of the images that are not there yet, at every scale."""
        made = []
        for scale in self.scales:
            start = time.monotonic()
            generated = generate_folder(
                pipeline,
                self.prompts,
                self.folder(scale),
                replace(self.settings, guidance_scale=scale),
                keys=self.keys,
                process=self.process,
                num_processes=self.num_processes,
                say=self.say,
            )
            made.append(generated)
            self.say(f"guidance {scale:g}: images after {time.monotonic() - start:.0f} s")
        return made

    def wait_for_others(self, folders: Sequence[Generated]) -> None:
        """Wait until the other processes have made theirs; a launcher ends all when one fails."""
        while self.num_processes > 1 and any(folder.missing() for folder in folders):
            time.sleep(_POLL_SEC)


def measure_sweep(
    folders: Sequence[Generated],
    reference: Reference,
    network: FeatureNetwork,
    clip: Clip,
    *,
    with_scenes: bool,
) -> list[dict[str, Any]]:
    """The figures of each scale's images.

    Args:
        folders: complete, one for each scale.
        reference: by the same network.
        network: of FID and KID.
        clip: of the CLIP score.
        with_scenes: the prompts are captions of scenes, which can be read back from the pixels.

    Returns:
        for each folder what `evaluate.metrics.measure` returns, its `guidance_scale`, `folder` and,
        of scenes, `scene_accuracy`.
    """
    rows = []
    for generated in folders:
        batches = Pictures(str(generated.folder)).batches(_BATCH_SIZE)
        figures = measure(collect_features(batches, network, clip), reference)
        row = {
            "guidance_scale": generated.settings["guidance_scale"],
            "folder": str(generated.folder),
            **figures,
        }
        if with_scenes:
            images = [image for batch in generated.iter_images(_BATCH_SIZE) for image in batch]
            row["scene_accuracy"] = asdict(score(generated.prompts, images))
        rows.append(row)
    return rows


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """The sweep as a Markdown table."""
    has_kid, has_scenes = "kid" in rows[0], "scene_accuracy" in rows[0]
    heads = ["guidance", "FID", *["KID (sd of subsets)"] * has_kid, "CLIP score (p10 to p90)"]
    heads += ["scenes all right (chance)"] * has_scenes
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        spread = row["clip_score_spread"]
        cells = [f"{row['guidance_scale']:g}", f"{row['fid']:.3f}"]
        if has_kid:
            cells.append(f"{row['kid']['mean']:.4f} ({row['kid']['std']:.4f})")
        cells.append(f"{row['clip_score']:.2f} ({spread['p10']:.1f} to {spread['p90']:.1f})")
        if has_scenes:
            right = row["scene_accuracy"]
            cells.append(f"{right['all_right']:.1%} ({right['chance']['all_right']:.1%})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
