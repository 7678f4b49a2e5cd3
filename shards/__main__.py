"""Look at a latent dataset, verify and repair it, clean it up, export it.

python -m shards info   data/latents
python -m shards verify data/latents             # receipts, lengths, sums: seconds
python -m shards verify --full data/latents      # also every byte, in parallel
python -m shards verify --decode 16 data/latents # decode samples, compare with their images
python -m shards repair data/latents             # set damage aside; precompute makes it again
python -m shards gc     data/latents             # what may go; --yes deletes it
python -m shards export data/latents out --format webdataset --resolution 256
python -m shards index  data/latents             # rebuild dataset.json from the receipts

A dataset is a folder or a URL such as s3://bucket/latents. --json prints one document instead of
text. Exit status: 0 all is well, 1 something is wrong with the dataset, 2 the command cannot run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from shards.cache import bounded_cache
from shards.column import Json
from shards.dataset import Dataset
from shards.errors import DatasetError, reported
from shards.export import FORMATS, export
from shards.garbage import delete_garbage, find_garbage
from shards.info import describe, print_info
from shards.layout import LEDGER
from shards.manifest import write_manifest
from shards.repair import repair
from shards.storage import Location, list_folders, location
from shards.verify import count_bytes, iter_problems


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m shards`."""
    with reported("shards"):  # a URL may be of no protocol that there is
        args = build_parser().parse_args(argv)
    with reported(f"shards {args.command}"):
        sys.exit(args.run(args))


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("dataset", type=location, help="latent dataset: a folder or a URL")
        command.add_argument("--json", action="store_true", help="print one JSON document")
        command.set_defaults(run=run)
        return command

    add("info", run_info, "columns, rows, bytes per sample by component, what was dropped and why")
    verify = add("verify", run_verify, "hold the dataset to its receipts; status 1 if it fails")
    verify.add_argument("--full", action="store_true", help="read and hash every byte")
    verify.add_argument(
        "--decode",
        type=_count,
        default=0,
        metavar="N",
        help="decode N samples of each image column back; compare with their source images where "
        "these can be read",
    )
    verify.add_argument(
        "--model",
        default="",
        help="model folder for --decode; default: the one that the dataset was made with",
    )
    add(
        "repair",
        run_repair,
        "verify every byte, set damaged files aside beside the dataset "
        "(<dataset>.aside), list what the next precompute will make again",
    )
    gc = add("gc", run_gc, "list, and with --yes delete, named columns and abandoned files")
    gc.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ID",
        help="a column to delete; may be repeated",
    )
    gc.add_argument("--yes", action="store_true", help="delete; without it nothing is touched")
    out = add("export", run_export, "write webdataset tars or MDS for other trainers")
    out.add_argument("out", type=location, help="folder or URL to write to")
    out.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="default: %(default)s")
    out.add_argument(
        "--resolution", type=int, default=0, help="of the image column; default: the only one"
    )
    out.add_argument("--image-column", default="", metavar="ID", help="where there are several")
    out.add_argument("--text-column", default="", metavar="ID", help="where there are several")
    add("index", run_index, "rebuild dataset.json from the receipts")
    for command in (verify, out):  # these read single rows, through a local copy of the shard
        command.add_argument(
            "--cache-dir",
            default="",
            metavar="FOLDER",
            help="for the shards of a remote dataset; default: ~/.cache/latentmill/shards",
        )
        command.add_argument(
            "--cache-gib",
            type=float,
            default=100.0,
            metavar="GIB",
            help="bound of that cache; default: %(default)s",
        )
    return parser


def _count(text: str) -> int:
    """A number that is not negative; argparse says what is wrong with another."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a count")
    return int(text)


def run_info(args: argparse.Namespace) -> int:
    """What there is."""
    info = describe(Dataset(args.dataset))
    print(json.dumps(info)) if args.json else print_info(info)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Is it whole?"""
    problems, redo = [], False
    with _bytes_bar(args, args.dataset if args.full else None) as bar:
        for problem in iter_problems(args.dataset, full=args.full, on_bytes=bar.update):
            problems.append(str(problem))
            redo = redo or problem.redo is not None
            if not args.json:
                bar.write(str(problem))
    decoded: list[Json] = []
    if args.decode:
        from precompute.decode_back import decode_back

        dataset = Dataset(args.dataset, bounded_cache(args.cache_dir, args.cache_gib))
        decoded = decode_back(dataset, args.decode, args.model)
        problems += [column["problem"] for column in decoded if column["problem"]]
    if args.json:
        print(json.dumps({"dataset": str(args.dataset), "problems": problems, "decoded": decoded}))
    else:
        _print_decoded(decoded)
        checked = "every byte" if args.full else "receipts, lengths and sums"
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        verdict = count if problems else f"clean ({checked} checked)"
        print(f"{args.dataset}: {verdict}")
        if redo:
            print(f"Remedy: python -m shards repair {args.dataset}, then the same precompute again")
    return 1 if problems else 0


def _print_decoded(decoded: list[Json]) -> None:
    for column in decoded:
        psnr = column["psnr_db"]
        shown = "no images to compare with"
        if psnr:
            shown = (
                f"PSNR {psnr['median']:.1f} dB (least {psnr['min']:.1f}), "
                f"{column['relative_error']:.2%} off a new encoding of their images"
            )
        print(
            f"{column['column']}: {column['samples']} samples decoded, {shown}, latents' mean "
            f"{column['latent_mean']:.3f}, deviation {column['latent_std']:.3f}"
            + (f": {column['problem']}" if column["problem"] else "")
        )


def run_repair(args: argparse.Namespace) -> int:
    """Set damage aside."""
    with _bytes_bar(args, args.dataset) as bar:
        done = repair(args.dataset, bar.update)
    if args.json:
        document = {
            "problems": [str(problem) for problem in done.problems],
            "aside": str(done.aside) if done.aside else None,
            "redo": [f"{folder}/{shard}" for folder, shard in done.redo],
        }
        print(json.dumps(document))
        return 0
    for problem in done.problems:
        print(problem)
    if done.aside:
        print(
            f"set aside in {done.aside}: {len(done.moved)} files. The same precompute again "
            "will make:"
        )
        for folder, shard in done.redo:
            print(f"  {folder}/{shard}")
    else:
        print(f"{args.dataset}: nothing to set aside; dataset.json is up to date")
    return 0


def run_gc(args: argparse.Namespace) -> int:
    """Delete what nobody wants."""
    clean = delete_garbage if args.yes else find_garbage
    garbage = clean(args.dataset, args.column)
    total = sum(garbage.values())
    if args.json:
        files = {str(path): size for path, size in garbage.items()}
        print(json.dumps({"files": files, "bytes": total, "deleted": args.yes}))
        return 0
    for path, size in garbage.items():
        print(f"{size:>15,}  {path}")
    done = "deleted" if args.yes else "would be deleted; --yes does it"
    print(f"{len(garbage)} files, {total:,} bytes {done}")
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Hand latents to other trainers."""
    dataset = Dataset(args.dataset, bounded_cache(args.cache_dir, args.cache_gib))
    resolutions = dataset.resolutions()
    if not args.resolution and len(resolutions) != 1:
        found = f"resolutions {resolutions} of plain squares"
        raise DatasetError(dataset.path, found, wanted="one", remedy="--resolution")
    image = dataset.image_column(args.resolution or resolutions[0], args.image_column)
    text = dataset.text_column(args.text_column)
    with tqdm(total=image.num_rows, unit="row", disable=_quiet(args), dynamic_ncols=True) as bar:
        settings = export(dataset, image, text, args.out, args.format, bar.update)
    done = f"{args.out}: {settings['rows']:,} samples as {args.format}; see export.json"
    print(json.dumps(settings) if args.json else done)
    return 0


def run_index(args: argparse.Namespace) -> int:
    """Rebuild dataset.json."""
    if LEDGER not in list_folders(args.dataset):
        raise DatasetError(args.dataset, "no latent dataset (no ledger folder)")
    manifest = write_manifest(args.dataset)
    counts = {"columns": len(manifest["columns"]), "shards": len(manifest["ledger"])}
    text = f"{args.dataset}: {counts['columns']} columns, {counts['shards']} shards"
    print(json.dumps(counts) if args.json else text)
    return 0


def _bytes_bar(args: argparse.Namespace, dataset: Location | None) -> Any:
    total = count_bytes(dataset) if dataset is not None and not _quiet(args) else None
    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        disable=_quiet(args) or total is None,
        dynamic_ncols=True,
    )


def _quiet(args: argparse.Namespace) -> bool:
    return args.json or not sys.stderr.isatty()


if __name__ == "__main__":
    main()
