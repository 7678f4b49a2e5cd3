"""Write samples in a peer's format, or read them with the peer: see `worker`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from .samples import Batch, draw_sample
from .worker import serve

_MODULES = {"webdataset": "webdataset_tars", "mds": "mosaic_mds", "litdata": "litdata_chunks"}


def main() -> None:
    """Parse, and do the one or the other."""
    parser = argparse.ArgumentParser(prog="python -m peers", description=__doc__)
    parser.add_argument("peer", choices=_MODULES)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write")
    write.add_argument("folder", type=Path)
    write.add_argument("num_samples", type=int)
    write.add_argument("samples_per_shard", type=int)
    read = commands.add_parser("read")
    read.add_argument("folder", type=Path)
    read.add_argument("batch_size", type=int)
    args = parser.parse_args()
    peer = import_module(f".{_MODULES[args.peer]}", __package__)
    if args.command == "write":
        args.folder.mkdir(parents=True)
        peer.write(map(draw_sample, range(args.num_samples)), args.folder, args.samples_per_shard)
    else:
        facts = {"version": version(peer.DISTRIBUTION), "settings": peer.SETTINGS}
        loader = peer.build_loader(args.folder, args.batch_size)
        serve(partial(_without_end, loader), facts)


def _without_end(loader: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from loader


if __name__ == "__main__":
    main()
