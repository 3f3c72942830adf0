"""Figures other than the training step: memory of the loss, attention in segments, loader, encoding, start of a run."""

import dataclasses
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Attention
from model.config import ModelConfig
from model.context import ForwardContext
from model.loss import linear_cross_entropy
from tests.bench.harness import Figure, alternate, figure, peak, reset_peak
from tests.support.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
TOKENS, VOCAB, DIM = 8192, 32_000, 256


def loss_memory(repeats: int) -> list[Figure]:
    """Peak memory of head and loss in forward and backward, each time in a new process."""
    peaks: dict[str, list[float]] = {"loss": [], "full": []}
    for _ in range(min(repeats, 3)):
        for method, measured in peaks.items():
            pool = Pool()
            measured.extend(pool.run(1, "tests.bench.around:loss_peak", method=method))
            pool.close()
    name = f"loss of {TOKENS:,} tokens x {VOCAB:,} words, dim {DIM}, forward and backward"
    return [figure(name, peaks["loss"], peaks["full"], "memory of full logits", "0.25", unit="MiB")]


def loss_peak(method: str) -> float:
    """MiB of the peak above the memory of the inputs and their gradients. method: "loss" or "full" (full logits)."""
    hidden, weight = torch.randn(TOKENS, DIM, requires_grad=True), torch.randn(VOCAB, DIM, requires_grad=True)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    targets = torch.randint(0, VOCAB, (TOKENS,))
    before = reset_peak()
    if method == "loss":
        linear_cross_entropy(hidden, weight, targets).backward()
    else:
        F.cross_entropy(hidden @ weight.t(), targets, reduction="sum").backward()
    return (peak() - before) / 2**20


class Masked:
    """The usual implementation of segments: a boolean mask (B, 1, S, S) of the keys that each query may attend to."""

    def __init__(self, segments: Tensor) -> None:
        """segments (B, S): the number of each token's segment."""
        length = segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        self.mask = ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, fused: Callable[..., Tensor]) -> Tensor:
        return fused(*(t.transpose(1, 2) for t in (q, k, v)), mask=self.mask).transpose(1, 2)


def attention(repeats: int) -> list[Figure]:
    """Attention within chunks, and within stories, compared with one masked product."""
    length, rows, figures = 2048, 4, []
    x, positions = torch.randn(rows, length, 256, requires_grad=True), torch.arange(length)[None]
    starts = torch.rand(rows, length, generator=torch.Generator().manual_seed(0)) < 1 / 200
    stories = starts.cumsum(1)  # number of each token's story; the mean length is 200 tokens
    for segments, chunk, documents in (("chunks of 256", 256, None), ("stories of about 200 tokens", None, stories)):
        layer = Attention(ModelConfig(dim=256, n_heads=8, attention_chunk=chunk, max_seq_len=length), 0)
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.02)

        def step(mask: bool, layer: Attention = layer, documents: Tensor | None = documents) -> None:
            context = ForwardContext.create(layer.config, x, documents=documents)  # once a forward
            if mask:
                numbers = (positions // 256).expand(rows, -1) if documents is None else documents
                context = dataclasses.replace(context, chunked_mask=Masked(numbers))
            layer(x, context).sum().backward()

        times = alternate({"ours": partial(step, False), "masked": partial(step, True)}, repeats)
        name = f"attention in {segments}, {rows} x {length:,} tokens, dim 256, forward and backward"
        figures.append(figure(name, times["ours"], times["masked"], "speed over a boolean mask", "", True))
    return figures


def loader(repeats: int) -> list[Figure]:
    """The batches of a step in the loader's order, compared with the usual random rows of a memory map."""
    from data.config import DataConfig
    from data.loader import BatchLayout, Loader, training_rows
    from data.prepare import main
    from data.settings import read
    from data.shards import Corpus

    with tempfile.TemporaryDirectory() as folder:
        settings = ["data.stories=20000", "data.seq_len=256", f"data.dir={folder}/corpus"]
        assert main(settings) == 0
        config: DataConfig = read({"data": DataConfig}, None, settings)["data"]
        corpus = Corpus.open(config.dir)
        tokenizer, split = corpus.tokenizer(), corpus.split("train")
        rows = training_rows(split, config, tokenizer.bos, tokenizer.pad)
        batches, tokens = Loader(rows, BatchLayout(256, 32, 1), 0, workers=0), split.shard(0).tokens
        number = itertools.count()
        generator = torch.Generator().manual_seed(0)

        def at_random() -> None:
            starts = torch.randint(0, len(tokens) - 257, (256,), generator=generator).tolist()
            torch.stack([torch.from_numpy(tokens[start : start + 257].astype("int64")) for start in starts])

        times = alternate({"ours": lambda: batches.step(next(number)), "at random": at_random}, 10 * repeats)
    name = "loader, 256 rows of 256 tokens"
    return [figure(name, times["ours"], times["at random"], "time over random rows of a memory map", "")]


def english(size: int, seed: int) -> list[str]:
    """Stories of about `size` bytes in total, of 50,000 different made-up words that are distributed by Zipf's law."""
    r = random.Random(seed)
    starts = "b d f g k l m n p r s t st tr".split()
    syllables = [a + b + c for a in starts for b in "aeiou" for c in ("", "n", "r", "s")]
    names = sorted({"".join(r.choices(syllables, k=r.choice((1, 2, 2, 3)))) for _ in range(60_000)})
    r.shuffle(names)
    weights = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(names))))
    stories: list[str] = []
    while size > 0:
        sentences = []
        for _ in range(r.randint(6, 20)):
            words = r.choices(names, cum_weights=weights, k=r.randint(4, 14))
            end = r.choice(".,!?") + r.choice(("", "", "\n"))
            sentences.append(" ".join([words[0].capitalize(), *words[1:]]) + end)
        stories.append(" ".join(sentences))
        size -= len(stories[-1])
    return stories


def encoding(repeats: int) -> list[Figure]:
    """Text to tokens, each story decoded again and compared: by one process, and by all cores to shards on disk.

    All cores are compared with datasets.map. The text is made-up English, or the file of stories (.jsonl, .txt,
    .parquet) that the environment variable STORIES names.
    """
    from data.config import DataConfig
    from data.encode import encode, usable_cores
    from data.shards import Writer
    from data.sources.base import TRAIN, Document
    from data.sources.open import open_source
    from data.tokenizer import Tokenizer, train

    if path := os.environ.get("STORIES"):
        named, texts = Path(path).name, [story.text for story in open_source(DataConfig(source=path))]
    else:
        named, texts = "made-up English", english(16_000_000, 1)
    size = sum(len(text.encode()) for text in texts)
    times_over = max(1, round(48e6 / size))
    documents = [Document(TRAIN, text, None) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        train(texts[::2], 8192, Path(folder) / "model")
        tokenizer = Tokenizer(Path(folder) / "model")

        def one() -> None:
            assert sum(story.text_bytes for story in encode(documents, tokenizer, 1)) == size

        def to_shards() -> None:
            with Writer(Path(folder), TRAIN, tokenizer, 50_000_000) as writer:
                for story in encode(documents * times_over, tokenizer, usable_cores()):
                    writer.add(story.ids, story.text_bytes, story.log_prob, story.roundtrip_failed)
            assert writer.info.text_bytes == size * times_over and not writer.info.misses

        cases: dict[str, Callable[[], object]] = {"one": one, "all": to_shards}
        cases["sentencepiece"] = lambda: [tokenizer.encode(text) for text in texts]
        peer = datasets_map(texts, times_over, folder)
        if peer is not None:
            cases["peer"] = peer
        times = alternate(cases, max(4, repeats // 3))
    rate = [size / 1e6 / seconds for seconds in times["one"]]
    plain = [size / 1e6 / seconds for seconds in times["sentencepiece"]]
    name = f"encoding {named}, vocabulary 8,192, checked"
    figures = [figure(f"{name}, one process", rate, plain, "speed over sentencepiece unchecked", "3 MB/s", unit="MB/s")]
    if peer is not None:
        name += f", {usable_cores()} processes, {size * times_over / 1e6:.0f} MB"
        figures.append(figure(name, times["all"], times["peer"], "speed over datasets.map, fast tokenizer", "2", True))
    return figures


def datasets_map(texts: list[str], times_over: int, folder: str) -> Callable[[], object] | None:
    """A function for datasets.map with a fast tokenizer and as many processes.

    None if `tokenizers` (extra `hub`) is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        return None
    import datasets

    from data.encode import usable_cores

    datasets.disable_progress_bars()
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8192, special_tokens=["<unk>"], show_progress=False)
    fast.train_from_iterator(texts[::2], trainer)
    datasets.Dataset.from_dict({"text": texts * times_over}).save_to_disk(f"{folder}/texts")
    table = datasets.load_from_disk(f"{folder}/texts")
    encode = partial(encode_fast, fast.to_str())
    cores = usable_cores()
    return lambda: table.map(encode, batched=True, num_proc=cores, load_from_cache_file=False, remove_columns="text")


def encode_fast(model: str, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    """Encode a batch with the fast tokenizer, which each process creates once."""
    import tokenizers

    if model not in _fast:
        _fast[model] = tokenizers.Tokenizer.from_str(model)
    return {"ids": [one.ids for one in _fast[model].encode_batch(batch["text"])]}


_fast: dict[str, "tokenizers.Tokenizer"] = {}  # type: ignore[name-defined]  # noqa: F821


def start(repeats: int) -> list[Figure]:
    """Seconds from the command to the end of the first step of launch/tiny.yaml, compared with importing torch."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", "launch/tiny.yaml", f"data.dir={folder}/corpus"]
        arguments += ["data.stories=3000", "data.vocab_size=512"]
        subprocess.run([sys.executable, "-m", "data.prepare", *arguments], cwd=ROOT, check=True, capture_output=True)

        def first_step(number: int) -> float:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            settings = [f"run.dir={folder}/runs", f"run.name=r{number}", "train.steps=1000"]
            command = [*launcher, "-m", "trainer.main", *arguments, *settings]
            metrics = Path(folder, "runs", f"r{number}", "metrics.jsonl")
            start_time = time.perf_counter()
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                while not (metrics.exists() and b'"kind": "train"' in metrics.read_bytes()):
                    assert process.poll() is None
                    time.sleep(0.02)
                seconds = time.perf_counter() - start_time
                process.terminate()
            return seconds

        times: dict[str, list[float]] = {"start": [], "torch": []}
        for number in range(max(3, repeats // 3)):
            times["start"].append(first_step(number))
            start_time = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch"], check=True)
            times["torch"].append(time.perf_counter() - start_time)
    name = "torchrun to the end of the first step, launch/tiny.yaml, 2 processes"
    return [figure(name, times["start"], times["torch"], "time over `import torch`", "10 s")]
