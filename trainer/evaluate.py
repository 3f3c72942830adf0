"""Validation loss over whole stories, one a row: the same at any number of ranks and whatever data.pack says.

`python -m trainer.evaluate --checkpoint runs/tiny` prints one JSON object as the last line of stdout. Targets are all
tokens after bos, eos included; what exceeds seq_len is cut and counted. Where the source knows its probabilities the
corpus's true cross-entropy is the floor, and `excess` is what the model loses against it.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trainer.cli import Parser, add_checkpoint, add_device, guarded

if TYPE_CHECKING:
    from data.shards import Corpus, Split
    from data.tokenizer import Tokenizer
    from model.transformer import Transformer
    from parallel.mesh import World
    from trainer.config import Config


def evaluate(
    model: "Transformer",
    corpus: "Corpus",
    config: "Config",
    batches: int | str,
    world: "World",
    split_name: str = "validation",
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The `eval` line: loss of `batches` (`all` or a number) times micro_batch_size stories, over all ranks.

    Calls `between` before each batch, which may raise on all ranks. Leaves training mode, biases and random numbers as
    they were.
    """
    import torch

    from data.loader import BatchLayout, story_rows
    from parallel.collectives import sum_over_ranks
    from trainer.machine import attention_of_any_length

    seq_len, size = config.data.seq_len, config.train.micro_batch_size
    split, tokenizer = corpus.split(split_name), corpus.tokenizer()
    rows = story_rows(split, seq_len, tokenizer.bos, tokenizer.pad)
    stories = len(rows) if batches == "all" else min(len(rows), int(batches) * size)
    device = model.embedding.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), attention_of_any_length():
            for places in BatchLayout(stories, size, world.size).of(world.rank):
                between()
                batch = rows.batch(list(places), [0] * len(places), trim=True).to(device)
                output = model(batch.tokens, batch.targets)
                assert output.loss is not None
                total += output.loss.double()
    finally:
        model.train(was_training)
    nats = float(sum_over_ranks(total)[0])
    return {"split": split_name, **summary(split, tokenizer, stories, seq_len, nats)}


def summary(split: "Split", tokenizer: "Tokenizer", stories: int, seq_len: int, nats: float) -> dict[str, Any]:
    """What is known of the first `stories` of a split, whose loss sums to `nats`."""
    tokens = cut = text_bytes = left = 0
    log_prob: float | None = 0.0
    left = stories
    for number in range(len(split.shards)):
        if left <= 0:
            break
        shard = split.shard(number)
        count = min(left, len(shard.starts) - 1)
        targets = shard.starts[1 : count + 1] - shard.starts[:count] - 1
        tokens += int(targets.clip(max=seq_len).sum())
        cut += int((targets - seq_len).clip(min=0).sum())
        whole = targets <= seq_len
        text_bytes += int(shard.text_bytes[:count][whole].sum())
        for start in shard.starts[:count][~whole]:  # of a story that is cut, what its first tokens spell
            text_bytes += len(tokenizer.decode(shard.tokens[start + 1 : start + 1 + seq_len].tolist()).encode())
        if shard.log_probs is None:
            log_prob = None
        elif log_prob is not None:
            log_prob += float(shard.log_probs[:count].sum())
        left -= count
    loss = nats / max(1, tokens)
    # the probability of the part that is left of a story is not known
    floor = None if log_prob is None or cut else -log_prob / max(1, tokens)
    return {
        "stories": stories,
        "tokens": tokens,
        "cut": cut,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / max(1, text_bytes),
        "floor": floor,
        "excess": None if floor is None else loss - floor,
    }


def describe(line: dict[str, Any]) -> str:
    """An `eval` line in words."""
    text = f"{line['split']} loss {line['loss']:.4f} nats/token"
    if line["floor"] is not None:
        text += f", the corpus's true floor {line['floor']:.4f}, excess {line['excess']:.4f}"
    text += f", {line['bits_per_byte']:.3f} bits per byte"
    return text + f" ({line['stories']} stories, {line['cut']} tokens cut)"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m trainer.evaluate", description="Validation loss of a checkpoint.")
    add_checkpoint(parser)
    parser.add_argument("--data", help="folder of a prepared corpus (default: the run's)")
    parser.add_argument("--split", default="validation", choices=["validation", "train"])
    parser.add_argument("--batches", default="all", help="all, or a number of micro_batch_size stories each")
    add_device(parser)
    args = parser.parse_args(argv)
    from data.settings import UserError
    from data.shards import Corpus
    from parallel.mesh import World
    from trainer.checkpoint.load import load_model
    from trainer.machine import dtype_name, set_threads

    if args.batches != "all" and not (args.batches.isdigit() and int(args.batches) > 0):
        raise UserError(f"--batches {args.batches}: give all, or a number from 1")
    set_threads("auto", World())
    model, tokenizer, config = load_model(args.checkpoint, args.device)
    corpus = Corpus.open(args.data or config.data.dir)
    if corpus.tokenizer().hash != tokenizer.hash:
        raise UserError(f"--data {corpus.folder}: its tokenizer is not the checkpoint's; prepare it with that")
    line = evaluate(model, corpus, config, args.batches, World(), args.split)
    line |= {"device": model.embedding.weight.device.type, "dtype": dtype_name(model.compute_dtype)}
    print(describe(line), file=sys.stderr)
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
