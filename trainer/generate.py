"""A story out: sampling with a key-value cache, token by token.

`python -m trainer.generate --checkpoint runs/tiny --prompt "Once upon a time"` streams prompt and continuation to
stdout, all else to stderr.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.config import UserError

if TYPE_CHECKING:
    import torch

    from data.tokenizer import Tokenizer
    from model.transformer import Transformer


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
            ("temperature", self.temperature >= 0),
            ("top_k", self.top_k >= 0),
            ("top_p", 0 < self.top_p <= 1),
            ("repetition_penalty", self.repetition_penalty > 0),
        ):
            if not good:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: out of range")


def generate(model: "Transformer", tokenizer: "Tokenizer", prompt: str, sampling: Sampling) -> Iterator[int]:
    """Tokens that continue `prompt` (bos before it), until eos (not given out), a limit, or the model's length.

    Training mode is left as it was. Raises UserError for a prompt that leaves no room.
    """
    import torch

    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    room = model.config.max_seq_len - len(ids) + 1
    if room < 1:
        raise UserError(f"--prompt: {len(ids)} tokens, the model takes at most {model.config.max_seq_len}")
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    never = torch.tensor(sorted({tokenizer.bos, tokenizer.pad, tokenizer.unk} - {tokenizer.eos}))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            caches = model.new_caches(1, min(model.config.max_seq_len, len(ids) + sampling.max_new_tokens))
            fresh = ids
            for _ in range(min(room, sampling.max_new_tokens)):
                output = model(torch.tensor([fresh], device=device), caches=caches)
                logits = output.logits[0, -1].float().cpu()
                logits[never] = -torch.inf
                token = choose(logits, ids, sampling, generator)
                if token == tokenizer.eos:
                    return
                yield token
                ids.append(token)
                fresh = [token]
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
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        logits[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0  # arXiv:1904.09751; the likeliest always stays
        probabilities = torch.zeros_like(probabilities).scatter(0, index, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def text_of(model: "Transformer", tokenizer: "Tokenizer", prompt: str, sampling: Sampling) -> Iterator[str]:
    """`generate` as pieces of text, never with half a character in them."""
    from data.tokenizer import StreamDecoder

    decoder = StreamDecoder(tokenizer)
    for token in tokenizer.encode(prompt):  # some tokenizers drop a blank at the very start of a text
        decoder.add(token)
    for token in generate(model, tokenizer, prompt, sampling):
        yield decoder.add(token)
    yield decoder.flush()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m trainer.generate", description="Continue a prompt.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or a run folder (its newest)")
    parser.add_argument("--prompt", default="Once upon a time", help="the beginning (default: %(default)s)")
    defaults = Sampling()
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens)
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0: greedy (%(default)s)")
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="0: all (%(default)s)")
    parser.add_argument("--top-p", type=float, default=defaults.top_p)
    parser.add_argument("--repetition-penalty", type=float, default=defaults.repetition_penalty)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    args = vars(parser.parse_args(argv))
    checkpoint, prompt = args.pop("checkpoint"), args.pop("prompt")
    sampling = Sampling(**args)
    from trainer.evaluate import load_model

    model, tokenizer, _ = load_model(checkpoint)
    sys.stdout.write(prompt)
    for piece in text_of(model, tokenizer, prompt, sampling):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    from trainer.main import guarded

    sys.exit(guarded(main))
