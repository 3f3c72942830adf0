"""Generation: tokens a second beside transformers' `generate` with the same weights, and what more experts cost."""

from collections.abc import Callable, Sequence

import torch

from model.config import ModelConfig
from model.transformer import Transformer
from tests.bench.harness import Figure, figure, in_turns
from trainer.generate import Sampling, generate_batch

VOCAB, PROMPT, NEW = 4096, 16, 64
SMALL = ModelConfig(
    dim=256, n_layers=4, n_heads=8, ffn_dim=1024, expert_dim=512, n_experts=31, moe_every=2, attention_chunk=64
)


class Numbers:
    """A tokenizer of numbers, without an end: every story is as long as asked for."""

    bos, eos, pad, unk = 1, -1, 0, 3

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def measure(repeats: int) -> list[Figure]:
    """Greedy, with caches, on one core: a token's products are too small to share without waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*beside_transformers(max(4, repeats // 3)), more_experts(repeats)]
    finally:
        torch.set_num_threads(threads)


def beside_transformers(repeats: int) -> list[Figure]:
    model, figures = initial(SMALL), list[Figure]()
    peer = exported(model)
    if peer is None:
        return figures
    for batch in (1, 8):
        prompts = torch.randint(4, VOCAB, (batch, PROMPT - 1), generator=torch.Generator().manual_seed(0)).tolist()
        times = in_turns({"ours": stories(model, prompts), "theirs": peer(prompts)}, repeats)
        ours, theirs = ([batch * NEW / seconds for seconds in times[name]] for name in ("ours", "theirs"))
        what = f"generation, dim 256, 31 experts, {PROMPT} + {NEW} tokens, batch {batch}, one core"
        figures.append(figure(what, ours, theirs, "speed over transformers' generate", "3", unit="tokens/s"))
    return figures


def more_experts(repeats: int) -> Figure:
    few, many = (stories(initial(SMALL.model_copy(update={"n_experts": n})), [[5] * 15]) for n in (7, 127))
    times = in_turns({"many": many, "few": few}, repeats)
    ours, other = ([seconds / NEW for seconds in times[name]] for name in ("many", "few"))
    return figure("generation, a token with 127 experts, one core", ours, other, "time over 7 experts", "1")


def initial(config: ModelConfig) -> Transformer:
    model = Transformer(config, VOCAB)
    model.init_weights(0)
    return model.eval()


def stories(model: Transformer, prompts: Sequence[Sequence[int]]) -> Callable[[], None]:
    texts = [" ".join(map(str, prompt)) for prompt in prompts]

    def call() -> None:
        made = generate_batch(model, Numbers(), texts, Sampling(NEW, temperature=0))  # type: ignore[arg-type]
        assert sum(1 for _ in made) == NEW * len(texts)

    return call


def exported(model: Transformer) -> Callable[[Sequence[Sequence[int]]], Callable[[], None]] | None:
    """What `hub export` makes of the model, in transformers; None where that (extra `hub`) is missing."""
    try:
        import transformers
    except ImportError:
        return None
    from trainer.hub.mapping import tensor_slices, to_hf_config

    config = transformers.Llama4TextConfig(**to_hf_config(model.config, VOCAB, 1, 2, "float32"))
    theirs = transformers.Llama4ForCausalLM(config).eval()
    plain = [part for part in tensor_slices(model.config, VOCAB) if part.is_plain]
    theirs.load_state_dict({p.hf_name: model.get_parameter(p.name).detach()[p.start : p.stop] for p in plain})

    def generator(prompts: Sequence[Sequence[int]]) -> Callable[[], None]:
        tokens = torch.tensor([[1, *prompt] for prompt in prompts])
        words = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)

        def call() -> None:
            made = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **words)
            assert made.shape == (len(tokens), PROMPT + NEW)

        return call

    return generator
