"""The commands `python -m trainer.hub export` and `python -m trainer.hub import`."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data.settings import UserError
from trainer.cli import Parser, add_checkpoint, add_device, guarded


def parse_size(text: str) -> int:
    """The number of bytes that `5GB`, `200MB` or `50KB` stands for. Raises UserError for other text."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if not match or not int(match[1]):
        raise UserError(f"--shard-size {text}: not a size; give a number with KB, MB or GB, such as 200MB or 5GB")
    return int(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m trainer.hub", description="To and from the Hugging Face format.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a checkpoint as a folder that transformers loads")
    add_checkpoint(out)
    out.add_argument("--out", type=Path, required=True, help="the folder to write; it must not exist")
    about = "dtype of the weights (default: %(default)s)"
    out.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help=about)
    out.add_argument("--shard-size", default="5GB", help="largest size of a file, such as 200MB (default: %(default)s)")
    out.add_argument("--plain", action="store_true", help="leave out what plain Llama 4 cannot express")
    out.add_argument("--data", help="corpus on which to measure the effect of a balance bias (default: the run's)")
    about = "how much of that corpus: all, a number of batches, or none (default: the run's eval.batches)"
    out.add_argument("--batches", default="run", help=about)
    add_device(out)
    into = commands.add_parser(
        "import", help="convert such a folder to a checkpoint, for evaluation, generation and training"
    )
    into.add_argument(
        "--from", type=Path, required=True, dest="source", help="a folder with config.json and safetensors"
    )
    into.add_argument("--out", type=Path, required=True, help="the folder to write; it must not exist")
    into.add_argument("--tokenizer", type=Path, help="a sentencepiece model (default: tokenizer.model in the folder)")
    args = parser.parse_args(argv)
    if args.command == "import":
        from trainer.hub.importer import import_folder

        import_folder(args.source, args.out, args.tokenizer)
        return 0
    if args.batches not in ("run", "all", "none") and not (args.batches.isdigit() and int(args.batches)):
        raise UserError(f"--batches {args.batches}: should be all, none, or a number from 1")
    from trainer.hub.export import export

    max_bytes = parse_size(args.shard_size)
    export(args.checkpoint, args.out, args.dtype, max_bytes, args.plain, args.data, args.batches, args.device)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
