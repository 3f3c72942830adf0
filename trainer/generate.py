"""Generates stories: samples tokens one by one with a key-value cache, for many prompts at a time.

`python -m trainer.generate --checkpoint runs/tiny --prompt "Once upon a time"` streams the prompt and its continuation
to stdout; everything else goes to stderr. With several prompts, the first story streams while the others are generated
with it, in one batch. The loop of a run uses `generate_text` for its samples, and `play.py` uses `generate`.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from data.settings import UserError
from trainer.cli import Parser, add_checkpoint, add_device, guarded
from trainer.fault_tolerance.launcher import exit_now

if TYPE_CHECKING:
    import torch

    from data.tokenizer import Tokenizer
    from model.transformer import Transformer


SEPARATOR = "\n\n---\n\n"  # between the stories of several prompts
TOP_P_CANDIDATES = 256  # the likeliest tokens that top_p sorts first; it sorts all tokens only if these are too few


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k=0 and top_p=1 keep all tokens.

    Raises UserError if a value is out of range.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, is_valid, valid in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("seed", -(2**63) <= self.seed < 2**63, "an integer of 64 bits"),
        ):
            if not is_valid:
                flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
                raise UserError(f"{flag} {value}: out of range; should be {valid}")


def generate(model: "Transformer", tokenizer: "Tokenizer", prompt: str, sampling: Sampling) -> Iterator[int]:
    """The tokens that continue bos and `prompt`, one by one, up to eos, which is not yielded.

    Ends also after max_new_tokens, or at max_seq_len + 1 tokens, bos and prompt included: the last token is not an
    input of the model, because no token follows it. The training mode of the model stays as it was. Raises UserError if
    bos and prompt have more than max_seq_len tokens.
    """
    for _, token in generate_batch(model, tokenizer, [prompt], sampling):
        yield token


def generate_batch(
    model: "Transformer", tokenizer: "Tokenizer", prompts: Sequence[str], sampling: Sampling
) -> Iterator[tuple[int, int]]:
    """Yields (number of the prompt, token): one token of each unfinished story in turn, as `generate` does for one.

    Prompt i draws with the seed `sampling.seed + i`, and its story is the one that `generate` yields with that seed, up
    to the rounding of a matrix multiplication with more rows. A story that has ended leaves the batch.
    """
    import torch

    from trainer.machine import attention_of_any_length

    ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    max_seq_len = model.config.max_seq_len
    for prompt_ids in ids:
        if len(prompt_ids) > max_seq_len:
            limit = f"the model accepts at most {max_seq_len}"
            raise UserError(f"--prompt: has {len(prompt_ids)} tokens, but {limit}; give a shorter one")
    max_lengths = [min(len(prompt_ids) + sampling.max_new_tokens, max_seq_len + 1) for prompt_ids in ids]
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(ids))]
    device = model.embedding.weight.device
    excluded = torch.tensor(sorted({tokenizer.bos, tokenizer.pad, tokenizer.unk} - {tokenizer.eos}))
    stories = list(range(len(ids)))  # the number of the unfinished story in each row of the cache
    longest = max(map(len, ids), default=0)
    inputs = [prompt_ids + [tokenizer.pad] * (longest - len(prompt_ids)) for prompt_ids in ids]
    was_training = model.training
    model.eval()
    try:
        cache = model.new_cache([len(prompt_ids) for prompt_ids in ids], max(max_lengths, default=1) - 1)
        while stories:
            # These contexts must not span the `yield`, because the caller's code runs there, on the same thread.
            with torch.no_grad(), attention_of_any_length():
                logits = model(torch.tensor(inputs, device=device), cache=cache).logits[:, -1].float().cpu()
            logits[:, excluded] = -torch.inf
            unfinished_rows = []  # of the cache
            for row, story in enumerate(stories):
                token = choose(logits[row], ids[story], sampling, generators[story])
                if token != tokenizer.eos:
                    ids[story].append(token)
                    yield story, token
                    if len(ids[story]) < max_lengths[story]:
                        unfinished_rows.append(row)
            if 0 < len(unfinished_rows) < len(stories):
                cache.keep_sequences(unfinished_rows)
            stories = [stories[row] for row in unfinished_rows]
            inputs = [ids[story][-1:] for story in stories]
    finally:
        model.train(was_training)


def choose(logits: "torch.Tensor", seen: list[int], sampling: Sampling, generator: "torch.Generator") -> int:
    """The next token, from logits (V,), which are changed in place.

    The repetition penalty (arXiv:1909.05858) acts on the tokens in `seen`: it divides a positive logit and multiplies
    another one, so that both tokens become less likely.
    """
    import torch

    if sampling.repetition_penalty != 1.0:
        index = torch.tensor(sorted(set(seen)))
        value = logits[index]
        logits[index] = torch.where(value > 0, value / sampling.repetition_penalty, value * sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    tokens = None  # the token of each logit; None if all tokens are there, in their order
    if 0 < sampling.top_k < len(logits):
        logits, tokens = logits.topk(sampling.top_k)
    # The largest logit becomes 0, so that dividing by a very low temperature does not overflow.
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        probabilities, kept = _nucleus(probabilities, sampling.top_p)
        tokens = kept if tokens is None else tokens[kept]
    drawn = int(torch.multinomial(probabilities, 1, generator=generator))
    return drawn if tokens is None else int(tokens[drawn])


def _nucleus(probabilities: "torch.Tensor", top_p: float) -> tuple["torch.Tensor", "torch.Tensor"]:
    """The probabilities of the likeliest tokens that together reach top_p, and their indices (arXiv:1904.09751).

    There is always at least one.
    """
    for count in (min(TOP_P_CANDIDATES, len(probabilities)), len(probabilities)):
        likeliest, index = probabilities.topk(count)
        sum_before = likeliest.cumsum(0) - likeliest
        if sum_before[-1] >= top_p:
            break
    return likeliest[sum_before < top_p], index[sum_before < top_p]


def generate_text(model: "Transformer", tokenizer: "Tokenizer", prompt: str, sampling: Sampling) -> Iterator[str]:
    """`generate` as pieces of text that hold whole characters."""
    for _, text in generate_texts(model, tokenizer, [prompt], sampling):
        yield text


def generate_texts(
    model: "Transformer", tokenizer: "Tokenizer", prompts: Sequence[str], sampling: Sampling
) -> Iterator[tuple[int, str]]:
    """`generate_batch` as (number of the prompt, piece of text).

    A piece holds whole characters; the bytes of a character that remains incomplete come at the end, as U+FFFD.
    """
    from data.tokenizer import StreamDecoder

    decoders = [StreamDecoder(tokenizer) for _ in prompts]
    for prompt, decoder in zip(prompts, decoders, strict=True):
        for token in tokenizer.encode(prompt):  # some tokenizers drop a space at the start of a text
            decoder.add(token)
    for story, token in generate_batch(model, tokenizer, prompts, sampling):
        yield story, decoders[story].add(token)
    for story, decoder in enumerate(decoders):
        yield story, decoder.flush()


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m trainer.generate", description="Continue prompts.")
    add_checkpoint(parser)
    about = "how a story begins (default: Once upon a time); give it several times for several stories"
    parser.add_argument("--prompt", action="append", help=about)
    defaults = Sampling()
    default = "(default: %(default)s)"
    about = f"longest continuation, in tokens {default}"
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, help=about)
    about = f"0: always the likeliest token {default}"
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help=about)
    about = f"sample only among the K likeliest tokens; 0: among all {default}"
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help=about)
    about = f"sample only among the likeliest tokens that together have probability P {default}"
    parser.add_argument("--top-p", type=float, default=defaults.top_p, help=about)
    about = f"above 1: tokens that are in the text already become less likely {default}"
    parser.add_argument("--repetition-penalty", type=float, default=defaults.repetition_penalty, help=about)
    about = f"seed of the first story; each further story adds 1 {default}"
    parser.add_argument("--seed", type=int, default=defaults.seed, help=about)
    add_device(parser)
    args = vars(parser.parse_args(argv))
    checkpoint, device = args.pop("checkpoint"), args.pop("device")
    prompts = args.pop("prompt") or ["Once upon a time"]
    sampling = Sampling(**args)
    from trainer.checkpoint.load import load_model  # here, so that --help does not wait for torch

    model, tokenizer, _ = load_model(checkpoint, device)
    _print_stories(prompts, generate_texts(model, tokenizer, prompts, sampling))
    return 0


def _print_stories(prompts: Sequence[str], texts: Iterator[tuple[int, str]]) -> None:
    """Stream the first story to stdout, then print the others, which were generated with it."""
    first = next(texts)  # raises UserError if a prompt is too long, before anything is printed
    later = ["" for _ in prompts]
    with suppress(BrokenPipeError):  # the reader has closed the pipe, such as `head`
        sys.stdout.write(prompts[0])
        for number, text in chain([first], texts):
            if number == 0:
                sys.stdout.write(text)
                sys.stdout.flush()
            else:
                later[number] += text
        for prompt, story in zip(prompts[1:], later[1:], strict=True):
            sys.stdout.write(f"{SEPARATOR}{prompt}{story}")
        sys.stdout.write("\n")


if __name__ == "__main__":
    exit_now(guarded(main))
