"""Generation: tokens per second compared with transformers' `generate` with the same weights; the cost of experts."""

from collections.abc import Callable, Sequence

import torch

from model.config import ModelConfig
from model.transformer import Transformer
from tests.bench.harness import Figure, alternate, figure
from trainer.generate import Sampling, generate_batch

VOCAB, PROMPT, NEW = 4096, 16, 64
SMALL = ModelConfig(
    dim=256, n_layers=4, n_heads=8, ffn_dim=1024, expert_dim=512, n_experts=31, moe_every=2, attention_chunk=64
)


class Numbers:
    """A tokenizer for texts of numbers. It has no end token, so every story has the requested length."""

    bos, eos, pad, unk = 1, -1, 0, 3

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def measure(repeats: int) -> list[Figure]:
    """Greedy decoding with caches, on one core: a token's products are too small for several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*compared_with_transformers(max(4, repeats // 3)), more_experts(repeats)]
    finally:
        torch.set_num_threads(threads)


def compared_with_transformers(repeats: int) -> list[Figure]:
    """Tokens per second for one story and for eight; no figures if `transformers` is not installed."""
    model = initial(SMALL)
    figures: list[Figure] = []
    peer = exported(model)
    if peer is None:
        return figures
    for batch in (1, 8):
        prompts = torch.randint(4, VOCAB, (batch, PROMPT - 1), generator=torch.Generator().manual_seed(0)).tolist()
        times = alternate({"ours": stories(model, prompts), "theirs": peer(prompts)}, repeats)
        ours = [batch * NEW / seconds for seconds in times["ours"]]
        theirs = [batch * NEW / seconds for seconds in times["theirs"]]
        name = f"generation, dim 256, 31 experts, {PROMPT} + {NEW} tokens, batch {batch}, one core"
        figures.append(figure(name, ours, theirs, "speed over transformers' generate", "3", unit="tokens/s"))
    return figures


def more_experts(repeats: int) -> Figure:
    """Time per token with 127 experts, compared with 7 experts."""
    prompts = [[5] * 15]
    with_127 = stories(initial(SMALL.model_copy(update={"n_experts": 127})), prompts)
    with_7 = stories(initial(SMALL.model_copy(update={"n_experts": 7})), prompts)
    times = alternate({"127": with_127, "7": with_7}, repeats)
    seconds_127 = [seconds / NEW for seconds in times["127"]]
    seconds_7 = [seconds / NEW for seconds in times["7"]]
    name = "generation, a token with 127 experts, one core"
    return figure(name, seconds_127, seconds_7, "time over 7 experts", "1")


def initial(config: ModelConfig) -> Transformer:
    """A model with initial weights, in evaluation mode."""
    model = Transformer(config, VOCAB)
    model.init_weights(0)
    return model.eval()


def stories(model: Transformer, prompts: Sequence[Sequence[int]]) -> Callable[[], None]:
    """A function that continues the prompts by NEW tokens."""
    texts = [" ".join(map(str, prompt)) for prompt in prompts]

    def call() -> None:
        tokens = generate_batch(model, Numbers(), texts, Sampling(NEW, temperature=0))  # type: ignore[arg-type]
        assert sum(1 for _ in tokens) == NEW * len(texts)

    return call


def exported(model: Transformer) -> Callable[[Sequence[Sequence[int]]], Callable[[], None]] | None:
    """A function like `stories` for the model that `hub export` writes, in transformers (extra `hub`).

    None if transformers is not installed.
    """
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
        settings = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)

        def call() -> None:
            result = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
            assert result.shape == (len(tokens), PROMPT + NEW)

        return call

    return generator
