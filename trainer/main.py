"""The command that trains: reads the settings, answers what needs no torch, and hands over to the loop.

    torchrun --nproc_per_node=2 -m trainer.main --config launch/tiny.yaml [section.key=value ...]
"""

import argparse
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from data.settings import UserError, help_text
from trainer import environment, faults
from trainer.config import SECTION_TYPES, read_config

VERSION = "0.1.0"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m trainer.main",
        description="Train a Llama-4-style mixture of experts. Run it again to resume.",
        epilog="settings (section.key=default):\n" + help_text(SECTION_TYPES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="a YAML file, such as launch/tiny.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and the memory it needs")
    parser.add_argument("--folder", action="store_true", help="print the run's folder and end")
    parser.add_argument("--list", action="store_true", help="print the runs in run.dir and end")
    parser.add_argument("--version", action="version", version=f"scout-trainer {VERSION}")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="over the file; the last one wins")
    args = parser.parse_intermixed_args(argv)
    if args.list:
        from trainer.config import RunConfig
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
    faults.die_with_parent()
    stop = faults.StopFlag().listen()  # until the process ends
    config = read_config(args.config, args.settings)
    from trainer.loop import train

    code = train(config, stop)
    if code:  # a save failed, but nobody died: to start again is the user's to decide
        faults.end_launcher()
    return code


def guarded(command: Callable[[], int]) -> int:
    """Runs a command; the user's mistakes end in one line and exit code 2, Ctrl-C in one line and 130.

    What another rank ended with is one line too. torchrun is kept from trying a mistake again. To be called before
    torch is imported, which reads the environment that is set here.
    """
    environment.set_defaults()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background it would be ignored
    try:
        return command()
    except UserError as error:
        faults.tell(str(error))
        code = 2
    except faults.RankFailed as error:
        faults.tell(str(error), faults.rank())
        code = error.code
    except KeyboardInterrupt:
        faults.tell("interrupted")
        return 130
    if code == 2:
        faults.end_launcher()
    return code


if __name__ == "__main__":
    faults.end(guarded(main))
