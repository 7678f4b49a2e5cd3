"""Whether a job compiles its encoders: `--compile auto`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from precompute.config import PrecomputeConfig
from shards.source_shard import SourceShard

# Half a million images of 64 kB. Estimated, not measured: encoding them takes a GPU half an hour,
# and compiling takes a worker one or two minutes.
_WORTH_BYTES = 32 * 10**9


def is_compiled(
    config: PrecomputeConfig, devices: Sequence[str], sources: Sequence[SourceShard]
) -> bool:
    """Whether the encoders of a job are compiled.

    Compiled or not, their rounding differs. So this looks at the command and the kind of machine,
    and at nothing that another number of workers, a part of the shards or an interruption would
    change: neither at what is left to do nor at `--shard-range`.

    Args:
        config: the command.
        devices: of the workers.
        sources: all shards that the command names.
    """
    if config.compile != "auto":
        return config.compile == "on"
    on_gpus = devices[0].startswith("cuda") and find_spec("triton") is not None
    return on_gpus and not config.bucket_step and _is_large(sources)


def _is_large(sources: Sequence[SourceShard]) -> bool:
    """Whether it is worth it; a shard of unknown length, a pipe's, is taken as one of many."""
    lengths = [source.num_bytes for source in sources]
    return None in lengths or sum(length or 0 for length in lengths) >= _WORTH_BYTES
