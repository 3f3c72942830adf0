"""Validation loss: a model is evaluated on whole stories, one a row, and compared with the corpus's true entropy.

The result is the same at any number of ranks up to rounding, whatever data.pack is. The loop of a run evaluates with
`evaluate`, and `python -m trainer.evaluate` does so for a checkpoint (`evaluate.py`).

The targets are all tokens after bos, eos included. Tokens beyond data.seq_len are cut, and counted. If the source of
the corpus knows the probability of each story, the true cross-entropy of these stories is the floor, and `excess` is
the loss minus the floor.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from data.loader import BatchLayout, story_rows
from data.shards import Corpus, Split
from data.tokenizer import Tokenizer
from model.transformer import Transformer
from parallel.collectives import sum_over_ranks
from parallel.mesh import World
from trainer.config import Config
from trainer.machine import attention_of_any_length


def evaluate(
    model: Transformer,
    corpus: Corpus,
    config: Config,
    batches: int | str,
    world: World,
    split_name: str = "validation",
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The fields of an `eval` line: the loss on `batches` (`all` or a number) times micro_batch_size stories.

    To be called on all ranks, which share the stories. `before_batch` is called before each batch, and may raise on all
    ranks. The training mode of the model, its balance biases and the random streams stay as they were.
    """
    seq_len, size = config.data.seq_len, config.train.micro_batch_size
    split, tokenizer = corpus.split(split_name), corpus.tokenizer()
    rows = story_rows(split, seq_len, tokenizer.bos, tokenizer.pad)
    n_stories = len(rows) if batches == "all" else min(len(rows), int(batches) * size)
    device = model.embedding.weight.device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), attention_of_any_length():
            for stories in BatchLayout(n_stories, size, world.size).indices(world.rank):
                before_batch()
                batch = rows.batch(list(stories), [0] * len(stories), trim=True).to(device)
                output = model(batch.tokens, batch.targets)
                assert output.loss is not None
                nats += output.loss.double()
    finally:
        model.train(was_training)
    total_nats = float(sum_over_ranks(nats)[0])
    return {"split": split_name, **summary(split, tokenizer, n_stories, seq_len, total_nats)}


def summary(split: Split, tokenizer: Tokenizer, n_stories: int, seq_len: int, nats: float) -> dict[str, Any]:
    """Counts, loss and floor of the first `n_stories` stories of a split, whose losses sum to `nats`."""
    n_tokens = n_cut = text_bytes = 0
    log_prob: float | None = 0.0  # None if the probability of some story is unknown
    remaining = n_stories
    for number in range(len(split.shards)):
        if remaining <= 0:
            break
        shard = split.shard(number)
        count = min(remaining, len(shard.starts) - 1)
        targets = shard.starts[1 : count + 1] - shard.starts[:count] - 1  # of each story: its tokens without bos
        n_tokens += int(targets.clip(max=seq_len).sum())
        n_cut += int((targets - seq_len).clip(min=0).sum())
        is_whole = targets <= seq_len
        text_bytes += int(shard.text_bytes[:count][is_whole].sum())
        for start in shard.starts[:count][~is_whole]:  # the text of a cut story is that of its first tokens
            text_bytes += len(tokenizer.decode(shard.tokens[start + 1 : start + 1 + seq_len].tolist()).encode())
        if shard.log_probs is None:
            log_prob = None
        elif log_prob is not None:
            log_prob += float(shard.log_probs[:count].sum())
        remaining -= count
    loss = nats / max(1, n_tokens)
    # If a story is cut, the probability of its remaining tokens is unknown.
    floor = None if log_prob is None or n_cut else -log_prob / max(1, n_tokens)
    return {
        "stories": n_stories,
        "tokens": n_tokens,
        "cut": n_cut,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / max(1, text_bytes),
        "floor": floor,
        "excess": None if floor is None else loss - floor,
    }


def describe_evaluation(line: dict[str, Any]) -> str:
    """The fields of an `eval` line as a sentence for the log."""
    text = f"{line['split']} loss {line['loss']:.4f} nats per token"
    if line["floor"] is not None:
        text += f" (true floor {line['floor']:.4f}, excess {line['excess']:.4f})"
    text += f", {line['bits_per_byte']:.3f} bits per byte, on {line['stories']:,} stories"
    if line["cut"]:
        text += f" ({line['cut']:,} tokens beyond data.seq_len were cut)"
    return text
