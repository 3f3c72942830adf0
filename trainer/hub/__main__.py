"""The commands `python -m trainer.hub export` and `import`."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data.settings import UserError
from trainer.cli import Parser, add_checkpoint, add_device, guarded


def size_of(text: str) -> int:
    """`5GB`, `200MB` or `50KB` -> bytes. Raises UserError."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if not match or not int(match[1]):
        raise UserError(f"--shard-size {text}: give it as 200MB or 5GB")
    return int(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m trainer.hub", description="To and from the Hugging Face layout.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="a checkpoint -> a folder that transformers loads")
    add_checkpoint(out)
    out.add_argument("--out", type=Path, required=True, help="the folder to write; must not exist")
    out.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    out.add_argument("--shard-size", default="5GB", help="of a file, at most: 200MB, 5GB (default: %(default)s)")
    out.add_argument("--plain", action="store_true", help="plain Llama 4, whatever it has no place for")
    out.add_argument("--data", help="prepared corpus to count on what a balance bias does (default: the run's)")
    out.add_argument("--batches", default="run", help="of it: all, a number, or none (default: the run's eval.batches)")
    add_device(out)
    into = commands.add_parser("import", help="such a folder -> a checkpoint to evaluate and generate with")
    into.add_argument("--from", type=Path, required=True, dest="source", help="a folder with config.json, safetensors")
    into.add_argument("--out", type=Path, required=True, help="the folder to write; must not exist")
    into.add_argument("--tokenizer", type=Path, help="a sentencepiece model (default: tokenizer.model of the folder)")
    args = parser.parse_args(argv)
    if args.command == "import":
        from trainer.hub.importer import import_folder

        import_folder(args.source, args.out, args.tokenizer)
        return 0
    if args.batches not in ("run", "all", "none") and not (args.batches.isdigit() and int(args.batches)):
        raise UserError(f"--batches {args.batches}: give all, none, or a number from 1")
    from trainer.hub.export import export

    size = size_of(args.shard_size)
    export(args.checkpoint, args.out, args.dtype, size, args.plain, args.data, args.batches, args.device)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
