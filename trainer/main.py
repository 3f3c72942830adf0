"""The command that trains: it reads the settings, and then starts or resumes the run.

torchrun --nproc_per_node=2 -m trainer.main --config launch/tiny.yaml [section.key=value ...]

torch is imported as late as possible, so that a wrong setting is reported within a fraction of a second.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from data.settings import help_text
from trainer.cli import Parser, guarded
from trainer.config import SECTION_TYPES, RunConfig, read_config
from trainer.fault_tolerance.launcher import die_with_parent, end_launcher, exit_now
from trainer.fault_tolerance.signals import StopFlag

VERSION = "0.1.0"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.list:
        from trainer.report import list_runs

        print(list_runs(runs_folder(args.settings)))
        return 0
    if args.folder:
        print(read_config(args.config, args.settings).run.folder)
        return 0
    if args.dry_run:
        from trainer.dryrun import print_plan

        print_plan(read_config(args.config, args.settings))
        return 0
    return train(args.config, args.settings)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m trainer.main",
        description="Train a Llama-4-style mixture-of-experts model. The same command resumes a run that was stopped.",
        epilog="settings (section.key=default):\n" + help_text(SECTION_TYPES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="a YAML file of settings, such as launch/tiny.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the plan of the run and its memory, and exit")
    parser.add_argument("--folder", action="store_true", help="print the run's folder, and exit")
    parser.add_argument("--list", action="store_true", help="print the runs in run.dir, and exit")
    parser.add_argument("--version", action="version", version=f"scout-trainer {VERSION}")
    parser.add_argument(
        "settings", nargs="*", metavar="section.key=value", help="overrides the file; the last value of a key is used"
    )
    return parser.parse_intermixed_args(argv)


def runs_folder(settings: Sequence[str]) -> Path:
    """The last `run.dir=` of the settings. `--list` reads no others, so that it needs no valid config."""
    folders = [word.partition("=")[2] for word in settings if word.startswith("run.dir=")]
    return Path(folders[-1] if folders else RunConfig().dir)


def train(config_path: str | None, settings: Sequence[str]) -> int:
    """Train with the settings of a file and of `section.key=value` words. Returns the exit code."""
    die_with_parent()
    stop = StopFlag().listen()  # until the process ends
    config = read_config(config_path, settings)
    from trainer.loop import train

    code = train(config, stop)
    if code:  # the last save failed although no process did, so a restart by torchrun would not help
        end_launcher()
    return code


if __name__ == "__main__":
    exit_now(guarded(main))
