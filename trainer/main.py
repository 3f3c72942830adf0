"""The command that trains: reads the settings, answers what needs no torch, and then starts the loop.

torchrun --nproc_per_node=2 -m trainer.main --config launch/tiny.yaml [section.key=value ...]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from data.settings import help_text
from trainer.cli import guarded
from trainer.config import SECTION_TYPES, RunConfig, read_config
from trainer.fault_tolerance.launcher import die_with_parent, end_launcher, exit_now
from trainer.fault_tolerance.signals import StopFlag

VERSION = "0.1.0"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m trainer.main",
        description="Train a Llama-4-style mixture of experts. Run the same command again to resume.",
        epilog="settings (section.key=default):\n" + help_text(SECTION_TYPES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="a YAML file, such as launch/tiny.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and the memory it needs")
    parser.add_argument("--folder", action="store_true", help="print the run's folder and exit")
    parser.add_argument("--list", action="store_true", help="print the runs in run.dir and exit")
    parser.add_argument("--version", action="version", version=f"scout-trainer {VERSION}")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="override the file; the last one wins")
    args = parser.parse_intermixed_args(argv)
    if args.list:
        from trainer.report import list_runs

        folders = [word.partition("=")[2] for word in args.settings if word.startswith("run.dir=")]
        print(list_runs(Path(folders[-1] if folders else RunConfig().dir)))
        return 0
    if args.folder:
        print(read_config(args.config, args.settings).run.folder)
        return 0
    if args.dry_run:
        from trainer.dryrun import print_plan

        print_plan(read_config(args.config, args.settings))
        return 0
    return train(args.config, args.settings)


def train(config_path: str | None, settings: Sequence[str]) -> int:
    """Train by the settings of a file and of words. Returns the exit code."""
    die_with_parent()
    stop = StopFlag().listen()  # until the process ends
    config = read_config(config_path, settings)
    from trainer.loop import train

    code = train(config, stop)
    if code:  # a save failed, and no process did: the user decides whether to start again
        end_launcher()
    return code


if __name__ == "__main__":
    exit_now(guarded(main))
