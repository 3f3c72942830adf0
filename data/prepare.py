"""The command that makes a corpus: source -> tokenizer -> shards -> manifest.

    python -m data.prepare [--config FILE] [section.key=value ...]

1. A finished corpus is left as it is: "ready" when settings and source are what it was made of, refused otherwise.
   What an interrupted run left behind is made anew.
2. The tokenizer is trained on the training split, or copied from the path given.
3. Stories are encoded in batches, decoded again to count those that do not come back, and written to shards.
4. The manifest, written last, makes it a corpus.
"""

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from data.config import DataConfig, UserError, help_text, read

if TYPE_CHECKING:  # at run time inside the functions: numpy and sentencepiece would slow down --help
    from data.shards import Corpus, Writer
    from data.sources import Document, Source
    from data.tokenizer import Tokenizer

BATCH_CHARACTERS = 4_000_000  # encoded and decoded at a time
T = TypeVar("T")


def prepare(config: DataConfig) -> tuple["Corpus", bool]:
    """The corpus that the settings ask for, and whether it had to be made. Raises UserError."""
    from data.shards import Corpus
    from data.sources import open_source

    folder = Path(config.dir)
    if corpus := finished(config, folder):
        return corpus, False
    source = open_source(config)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        if corpus := finished(config, folder):  # made by the one we waited for
            return corpus, False
        make(config, source, folder)
    return Corpus.open(folder), True


def finished(config: DataConfig, folder: Path) -> "Corpus | None":
    """The corpus in `folder`, None when it is not finished. Raises UserError when it was made of anything else."""
    from data.shards import MANIFEST, Corpus, differences, settings_of
    from data.sources import open_source

    if not (folder / MANIFEST).exists():
        return None
    corpus = Corpus.open(folder)
    made = corpus.manifest
    changed = [f"data.{key} {old} -> {new}" for key, old, new in differences(made.settings, settings_of(config))]
    if not changed:
        corpus.check(config)  # a given tokenizer may have changed under its name
        try:
            now = open_source(config).fingerprint()
        except UserError:  # many delete the stories once they are tokens
            print(f"data.source={config.source}: not there any more; the corpus stands for it", file=sys.stderr)
            return corpus
        changed = [f"{key}: {old} -> {new}" for key, old, new in differences(made.source, now)]
    if changed:
        raise UserError(
            f"data.dir={folder}: the corpus there was made of something else ({'; '.join(changed[:3])}"
            f"{'; ...' if changed[3:] else ''}); give another data.dir, or delete that folder"
        )
    return corpus


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other `prepare` writes to `folder`; two terminals or nodes may start it at once."""
    import fcntl

    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"data.dir={folder}: another prepare is at work there; waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(config: DataConfig, source: "Source", folder: Path) -> None:
    """Writes a whole corpus, manifest last. Raises UserError."""
    from data.shards import MANIFEST, MODEL, Manifest, Writer, settings_of
    from data.sources import TRAIN, VALIDATION
    from data.tokenizer import write_aside

    for name in (TRAIN, VALIDATION):
        for old in folder.glob(f"{name}-*.shard*"):
            old.unlink()
    fingerprint = source.fingerprint()
    tokenizer = make_tokenizer(config, source, folder / MODEL)
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(Writer(folder, name, tokenizer, config.shard_tokens))
            for name in (TRAIN, VALIDATION)
        }
        encode(watched("encoding", source, source), tokenizer, writers)
    if config.clean:
        print(f"data.clean: {source.cleaner}", file=sys.stderr)
    stories = sum(writer.info.documents for writer in writers.values())
    for name, writer in writers.items():
        if not writer.info.documents:
            raise UserError(
                f"data.validation={config.validation}: leaves no story for {name}, of {stories} in "
                f"data.source={config.source}; give another fraction, a path, or more stories"
            )
    manifest = Manifest(
        settings=settings_of(config),
        source=fingerprint,
        empty=source.empty,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        splits={name: writer.info for name, writer in writers.items()},
    )
    write_aside(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())


def make_tokenizer(config: DataConfig, source: "Source", path: Path) -> "Tokenizer":
    """Trains on the training split, or copies the given model, to `path`. Raises UserError."""
    from data.tokenizer import Tokenizer, train, write_aside

    if config.tokenizer == "train":
        train(watched("reading for the tokenizer", source, source.training_texts()), config.vocab_size, path)
    else:
        write_aside(path, Tokenizer(Path(config.tokenizer).expanduser()).path.read_bytes())
    return Tokenizer(path)


def encode(documents: "Iterable[Document]", tokenizer: "Tokenizer", writers: "dict[str, Writer]") -> None:
    """Stories -> shards, counting those that do not decode to themselves."""
    for batch in batches(documents):
        ids = tokenizer.encode_all([document.text for document in batch])
        for document, its_ids, decoded in zip(batch, ids, tokenizer.decode_all(ids), strict=True):
            writer = writers[document.split]
            writer.add(its_ids, len(document.text.encode()), document.log_prob)
            writer.info.misses += decoded != document.text


def batches(documents: "Iterable[Document]") -> "Iterator[list[Document]]":
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def watched(what: str, source: "Source", items: Iterable[T]) -> Iterator[T]:
    """The items of a source, with a bar on a terminal or a line for each quarter elsewhere, on stderr."""
    from tqdm import tqdm

    told = 0  # quarters
    with tqdm(total=source.total, desc=what, unit=source.unit, unit_scale=True, disable=None, leave=False) as bar:
        for item in items:
            yield item
            bar.update(source.position - bar.n)
            quarter = min(source.position * 4 // source.total, 3)
            if bar.disable and quarter > told:
                told = quarter
                print(f"{what}: {25 * quarter}%", file=sys.stderr)
        if bar.disable:
            print(f"{what}: done", file=sys.stderr)


def summary(corpus: "Corpus", seconds: float) -> str:
    """One line on what was made."""
    train, validation = (corpus.manifest.splits[name] for name in ("train", "validation"))
    text_bytes, tokens = train.text_bytes + validation.text_bytes, train.tokens + validation.tokens
    misses, empty = train.misses + validation.misses, corpus.manifest.empty
    return (
        f"{corpus.folder}: {train.documents:,} + {validation.documents:,} stories, {tokens:,} tokens, "
        f"{text_bytes / tokens:.2f} bytes a token, {misses} stories not decoded to themselves"
        f"{f', {empty} empty ones passed over' if empty else ''}; "
        f"{seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s"
    )


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m data.prepare --help")


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="python -m data.prepare",
        description="Makes the corpus that the settings ask for.",
        epilog=f"settings (words of other sections are passed over):\n{help_text({'data': DataConfig})}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, such as launch/tiny.yaml")
    parser.add_argument("words", metavar="section.key=value", nargs="*", help="a setting, over those of the file")
    began = time.monotonic()
    try:
        options = parser.parse_intermixed_args(argv)
        config: DataConfig = read({"data": DataConfig}, options.config, options.words)["data"]
        corpus, made = prepare(config)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the corpus is unfinished, the same command makes it anew", file=sys.stderr)
        return 130
    except OSError as error:  # disk full, no permission
        print(f"{error.filename or f'data.dir={config.dir}'}: {error.strerror}", file=sys.stderr)
        return 2
    if made:
        print(summary(corpus, time.monotonic() - began))
        print(f"next: torchrun --nproc_per_node=1 -m trainer.main {shlex.join(argv)}".rstrip())
    else:
        stories = sum(split.documents for split in corpus.manifest.splits.values())
        print(f"ready: {corpus.folder} holds the {stories:,} stories already")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
