"""Stories out: sampling with a key-value cache, token by token, many prompts at a time.

`python -m trainer.generate --checkpoint runs/tiny --prompt "Once upon a time"` streams prompt and continuation to
stdout, all else to stderr. With several prompts the first story streams while the others are made beside it.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from data.settings import Parser, UserError
from trainer.fault_tolerance.launcher import exit_now

if TYPE_CHECKING:
    import torch

    from data.tokenizer import Tokenizer
    from model.transformer import Transformer


BETWEEN = "\n\n---\n\n"  # the stories of several prompts
NUCLEUS = 256  # tokens that are sorted at first for top_p


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good in (
            ("max_new_tokens", self.max_new_tokens >= 1),
            ("temperature", 0 <= self.temperature < math.inf),
            ("top_k", self.top_k >= 0),
            ("top_p", 0 < self.top_p <= 1),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf),
            ("seed", -(2**63) <= self.seed < 2**63),
        ):
            if not good:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: out of range")


def generate(model: "Transformer", tokenizer: "Tokenizer", prompt: str, sampling: Sampling) -> Iterator[int]:
    """Tokens that continue `prompt` (bos before it), until eos (not given out), a limit, or the model's length.

    The last token stands at position max_seq_len: one more than the model takes in, since nothing follows it.
    Training mode is left as it was. Raises UserError for a prompt that leaves no room.
    """
    for _, token in generate_batch(model, tokenizer, [prompt], sampling):
        yield token


def generate_batch(
    model: "Transformer", tokenizer: "Tokenizer", prompts: Sequence[str], sampling: Sampling
) -> Iterator[tuple[int, int]]:
    """(number of the prompt, token) as they come, a token of each story in turn until it ends, as in `generate`.

    Prompt i draws with seed + i, and continues as it would alone with that seed, up to the rounding of a product that
    has more rows. Stories that ended leave the batch.
    """
    import torch

    from trainer.machine import attention_of_any_length

    ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    most = model.config.max_seq_len
    for prompt in ids:
        if len(prompt) > most:
            raise UserError(f"--prompt: {len(prompt)} tokens, the model takes at most {most}")
    ends = [min(len(prompt) + sampling.max_new_tokens, most + 1) for prompt in ids]
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(ids))]
    device = model.embedding.weight.device
    never = torch.tensor(sorted({tokenizer.bos, tokenizer.pad, tokenizer.unk} - {tokenizer.eos}))
    rows, longest = list(range(len(ids))), max(map(len, ids), default=0)  # stories that go on, in the cache's order
    tokens = [prompt + [tokenizer.pad] * (longest - len(prompt)) for prompt in ids]
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache([len(prompt) for prompt in ids], max(ends, default=1) - 1)
        while rows:
            with torch.no_grad(), attention_of_any_length():  # not around the yield, which lends this thread to others
                logits = model(torch.tensor(tokens, device=device), cache=cache).logits[:, -1].float().cpu()
            logits[:, never] = -torch.inf
            going = []  # places in the cache
            for place, row in enumerate(rows):
                token = choose(logits[place], ids[row], sampling, generators[row])
                if token != tokenizer.eos:
                    ids[row].append(token)
                    yield row, token
                    if len(ids[row]) < ends[row]:
                        going.append(place)
            if 0 < len(going) < len(rows):
                cache.keep_rows(going)
            rows = [rows[place] for place in going]
            tokens = [ids[row][-1:] for row in rows]
    finally:
        model.train(was_training)


def choose(logits: "torch.Tensor", seen: list[int], sampling: Sampling, generator: "torch.Generator") -> int:
    """The next token from logits (V,); the penalty (arXiv:1909.05858) acts on tokens already `seen`."""
    import torch

    if sampling.repetition_penalty != 1.0:
        index = torch.tensor(sorted(set(seen)))
        value = logits[index]
        logits[index] = torch.where(value > 0, value / sampling.repetition_penalty, value * sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    places = None
    if 0 < sampling.top_k < len(logits):
        logits, places = logits.topk(sampling.top_k)
    # the largest becomes 0, so that no temperature, however low, makes an infinity of it
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        probabilities, order = _nucleus(probabilities, sampling.top_p)
        places = order if places is None else places[order]
    drawn = int(torch.multinomial(probabilities, 1, generator=generator))
    return drawn if places is None else int(places[drawn])


def _nucleus(probabilities: "torch.Tensor", top_p: float) -> tuple["torch.Tensor", "torch.Tensor"]:
    """The likeliest tokens that reach top_p together (arXiv:1904.09751), and which they are; one always stays."""
    for count in (min(NUCLEUS, len(probabilities)), len(probabilities)):
        likely, order = probabilities.topk(count)
        before = likely.cumsum(0) - likely
        if before[-1] >= top_p:
            break
    return likely[before < top_p], order[before < top_p]


def text_of(model: "Transformer", tokenizer: "Tokenizer", prompt: str, sampling: Sampling) -> Iterator[str]:
    """`generate` as pieces of text, never with half a character in them."""
    for _, piece in texts_of(model, tokenizer, [prompt], sampling):
        yield piece


def texts_of(
    model: "Transformer", tokenizer: "Tokenizer", prompts: Sequence[str], sampling: Sampling
) -> Iterator[tuple[int, str]]:
    """`generate_batch` as (number of the prompt, piece of text); what is held back of a character comes at the end."""
    from data.tokenizer import StreamDecoder

    decoders = [StreamDecoder(tokenizer) for _ in prompts]
    for prompt, decoder in zip(prompts, decoders, strict=True):
        for token in tokenizer.encode(prompt):  # some tokenizers drop a blank at the very start of a text
            decoder.add(token)
    for row, token in generate_batch(model, tokenizer, prompts, sampling):
        yield row, decoders[row].add(token)
    for row, decoder in enumerate(decoders):
        yield row, decoder.flush()


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m trainer.generate", description="Continue prompts.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or a run folder (its newest)")
    parser.add_argument("--prompt", action="append", help="the beginning (Once upon a time); again: one more story")
    defaults = Sampling()
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0: greedy (%(default)s)")
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="only the K likeliest; 0: all (%(default)s)")
    parser.add_argument(
        "--top-p", type=float, default=defaults.top_p, help="only the likeliest that reach P together (%(default)s)"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=defaults.repetition_penalty,
        help="above 1: less of what was there before (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the first prompt, then + 1 (%(default)s)")
    from trainer.checkpoint.load import load_model
    from trainer.cli import add_device

    add_device(parser)
    args = vars(parser.parse_args(argv))
    device, checkpoint, prompts = args.pop("device"), args.pop("checkpoint"), args.pop("prompt") or ["Once upon a time"]
    sampling = Sampling(**args)
    model, tokenizer, _ = load_model(checkpoint, device)
    later = dict.fromkeys(range(1, len(prompts)), "")
    pieces = texts_of(model, tokenizer, prompts, sampling)
    first = next(pieces)  # a prompt that does not fit is told before anything is written
    with suppress(BrokenPipeError):  # who reads it has enough
        sys.stdout.write(prompts[0])
        for row, piece in chain([first], pieces):
            if row == 0:
                sys.stdout.write(piece)
                sys.stdout.flush()
            else:
                later[row] += piece
        for row, story in later.items():
            sys.stdout.write(f"{BETWEEN}{prompts[row]}{story}")
        sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    from trainer.cli import guarded

    exit_now(guarded(main))
