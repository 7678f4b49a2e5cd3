"""Look at what a run has learnt, measure it, and hand it on.

python -m evaluate sample --source runs/x --prompts "a lion; a leaf"
python -m evaluate guidance --source runs/demo --scenes data/demo/scenes/held_out
python -m evaluate export --run runs/x --out pipeline
"""

from __future__ import annotations

from shards.command_line import run_command

_COMMANDS = {
    "sample": "SampleConfig",
    "generate": "GenerateConfig",
    "metrics": "MetricsConfig",
    "guidance": "GuidanceConfig",
    "scenes": "ScenesConfig",
    "export": "ExportConfig",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m evaluate`."""
    run_command("evaluate", _COMMANDS, __doc__ or "", argv)


if __name__ == "__main__":
    main()
