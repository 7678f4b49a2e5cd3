"""Images over HTTP: from a run, an exported folder or any diffusers pipeline.

python -m serve run --source runs/demo
curl -s localhost:8000/v1/images -H 'content-type: application/json' -d '{"prompt": "a lion"}'
python -m serve up demo --source runs/demo
python -m serve query demo --prompt "a large red circle" --out circle.png
python -m serve down demo
"""

from __future__ import annotations

from shards.command_line import run_command

_COMMANDS = {
    "run": "RunConfig",
    "up": "UpConfig",
    "query": "QueryConfig",
    "status": "StatusConfig",
    "down": "DownConfig",
    "diff": "DiffConfig",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m serve`."""
    run_command("serve", _COMMANDS, __doc__ or "", argv)


if __name__ == "__main__":
    main()
