"""The command `python -m trainer.evaluate`: the validation loss of a checkpoint (`evaluation.py`).

The last line of stdout is one JSON object; the same result in words goes to stderr.
"""

import json
import sys
from collections.abc import Sequence

from trainer.cli import Parser, add_checkpoint, add_device, guarded


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m trainer.evaluate", description="Validation loss of a checkpoint.")
    add_checkpoint(parser)
    parser.add_argument("--data", help="the folder of a prepared corpus (default: the run's)")
    about = "which stories to evaluate (default: %(default)s)"
    parser.add_argument("--split", default="validation", choices=["validation", "train"], help=about)
    about = "how many batches of train.micro_batch_size stories: all, or a number (default: all)"
    parser.add_argument("--batches", default="all", help=about)
    add_device(parser)
    args = parser.parse_args(argv)
    from data.settings import UserError
    from data.shards import Corpus
    from parallel.mesh import World
    from trainer.checkpoint.load import load_model
    from trainer.evaluation import describe_evaluation, evaluate
    from trainer.machine import dtype_name, set_threads

    if args.batches != "all" and not (args.batches.isdigit() and int(args.batches) > 0):
        raise UserError(f"--batches {args.batches}: should be all, or a number from 1")
    set_threads("auto", World())
    model, tokenizer, config = load_model(args.checkpoint, args.device)
    corpus = Corpus.open(args.data or config.data.dir)
    if corpus.tokenizer().hash != tokenizer.hash:
        raise UserError(
            f"--data {corpus.folder}: was prepared with another tokenizer than the checkpoint's; prepare a corpus with "
            f"data.tokenizer={tokenizer.path}"
        )
    line = evaluate(model, corpus, config, args.batches, World(), args.split)
    line |= {"device": model.embedding.weight.device.type, "dtype": dtype_name(model.compute_dtype)}
    print(describe_evaluation(line), file=sys.stderr)
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
