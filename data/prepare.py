"""The first command on the way from story to checkpoint: makes a corpus of tokens from a source of stories.

    python -m data.prepare [--config FILE] [section.key=value ...]

1. If the corpus is finished, it is never changed: if the settings and the source are those that it was made from, the
   command prints "ready"; otherwise it ends with an error.
2. If a previous run was interrupted, this run resumes after the last finished shard. If the settings or the source have
   changed since, it starts over.
3. The tokenizer is trained on the training split, or copied from the given path.
4. Stories are encoded on all cores and written to shards. Those that do not decode to themselves are counted.
5. The manifest, which is written last, completes the corpus.
"""

import argparse
import contextlib
import errno
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from data.config import DataConfig
from data.settings import Parser, UserError, help_text, read

if TYPE_CHECKING:  # imported at run time inside the functions: numpy and sentencepiece would slow down --help
    from data.shards import Corpus, Manifest, Progress
    from data.sources.base import Document, Source
    from data.tokenizer import Tokenizer

T = TypeVar("T")

RESUME = "run the same command again to resume after the last finished shard"


def prepare(config: DataConfig) -> tuple["Corpus", bool]:
    """The corpus that the settings describe, and whether it was made by this call. Raises UserError."""
    from data.shards import Corpus
    from data.sources.open import open_source

    folder = Path(config.dir)
    if corpus := open_finished(config, folder):
        return corpus, False
    source = open_source(config)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        if corpus := open_finished(config, folder):  # another process made it while this one waited
            return corpus, False
        write_corpus(config, source, folder)
    return Corpus.open(folder), True


def open_finished(config: DataConfig, folder: Path) -> "Corpus | None":
    """The corpus in `folder`; None if it is not finished.

    Raises UserError if it is damaged or was made from other settings or another source.
    """
    from data.shards import MANIFEST, Corpus
    from data.sources.open import open_source

    if not (folder / MANIFEST).exists():
        return None
    corpus = Corpus.open(folder)
    manifest = corpus.manifest
    changes = describe_changes(manifest, config, manifest.source)
    if not changes:
        corpus.check(config)  # the content of a given tokenizer file may have changed
        try:
            changes = describe_changes(manifest, config, open_source(config).fingerprint())
        except UserError:  # many users delete the stories after they have been tokenized
            print(f"data.source={config.source}: not available; using the finished corpus in {folder}", file=sys.stderr)
    if changes:
        raise UserError(
            f"data.dir={folder}: the corpus here was made from other settings or stories ({changes}); "
            "give another data.dir, or delete that folder"
        )
    return corpus


def describe_changes(old: "Manifest | Progress", config: DataConfig, source: dict[str, str]) -> str:
    """The settings and parts of the source that have changed since `old` was written, in one line; empty if none."""
    from data.shards import differences

    changes = [
        f"data.{key} {before} -> {after}" for key, before, after in differences(old.settings, config.corpus_settings())
    ]
    changes += [f"{name}: {before} -> {after}" for name, before, after in differences(old.source, source)]
    if len(changes) > 3:
        changes = [*changes[:3], "..."]
    return "; ".join(changes)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Waits until no other `data.prepare` writes to `folder`, since several terminals or nodes may start it at once.

    The operating system releases the lock if its holder is killed.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"data.dir={folder}: waiting for another data.prepare that is writing here", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_corpus(config: DataConfig, source: "Source", folder: Path) -> None:
    """Writes a whole corpus, manifest last. Raises UserError."""
    from data.encode import encode
    from data.shards import MANIFEST, MODEL, PROGRESS, Manifest, Writer
    from data.sources.base import TRAIN, VALIDATION
    from data.tokenizer import Tokenizer, write_atomic

    fingerprint = source.fingerprint()
    progress = load_or_start_progress(config, source, folder, fingerprint)
    tokenizer = Tokenizer(folder / MODEL)
    finished = {name: info.documents for name, info in progress.splits.items()}
    if any(finished.values()):
        print(f"data.dir={folder}: resuming after {sum(finished.values()):,} stories", file=sys.stderr)

    writers: dict[str, Writer] = {}

    def save_progress() -> None:
        progress.splits.update({name: writer.finished for name, writer in writers.items()})
        write_atomic(folder / PROGRESS, progress.model_dump_json(indent=1).encode())

    with contextlib.ExitStack() as stack:
        for name in (TRAIN, VALIDATION):
            writer = Writer(folder, name, tokenizer, config.shard_tokens, progress.splits.get(name), save_progress)
            writers[name] = stack.enter_context(writer)
        save_progress()
        documents = skip_finished(with_progress("encoding", source, source), finished)
        with contextlib.closing(encode(documents, tokenizer)) as stories:
            for story in stories:
                writers[story.split].add(story.ids, story.text_bytes, story.log_prob, story.roundtrip_failed)
    if source.fingerprint() != fingerprint:
        raise UserError(
            f"data.source={config.source}: it changed while it was being read; run the same command again to start over"
        )
    if config.clean:
        print(f"data.clean: {source.cleaner}", file=sys.stderr)
    total = sum(writer.info.documents for writer in writers.values())
    for name, writer in writers.items():
        if not writer.info.documents:
            raise UserError(
                f"data.validation={config.validation}: none of the {total} stories of data.source={config.source} "
                f"is in the {name} split; give another fraction, a path, or more stories"
            )
    manifest = Manifest(
        settings=config.corpus_settings(),
        source=fingerprint,
        empty=source.empty,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        splits={name: writer.info for name, writer in writers.items()},
    )
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    (folder / PROGRESS).unlink(missing_ok=True)


def load_or_start_progress(
    config: DataConfig, source: "Source", folder: Path, fingerprint: dict[str, str]
) -> "Progress":
    """The progress of an interrupted run, if it had the same settings, source and tokenizer.

    Otherwise deletes the files of that run, writes the tokenizer, and returns a new progress. Raises UserError.
    """
    from data.shards import MODEL, PROGRESS, Progress
    from data.sources.base import TRAIN, VALIDATION
    from data.tokenizer import Tokenizer

    given_model = folder / MODEL if config.tokenizer == "train" else Path(config.tokenizer).expanduser()
    try:
        progress = Progress.model_validate_json((folder / PROGRESS).read_bytes())
        changes = describe_changes(progress, config, fingerprint)
        if not changes:
            if progress.tokenizer_hash == Tokenizer(folder / MODEL).hash == Tokenizer(given_model).hash:
                return progress
            changes = "the tokenizer"
        print(
            f"data.dir={folder}: the unfinished corpus here was started from other settings or stories ({changes}); "
            "starting over",
            file=sys.stderr,
        )
    except (OSError, ValueError, UserError):
        pass  # there was no interrupted run, or its files are incomplete
    (folder / PROGRESS).unlink(missing_ok=True)
    for name in (TRAIN, VALIDATION):
        for shard in folder.glob(f"{name}-*.shard*"):
            shard.unlink()
    tokenizer = write_tokenizer(config, source, folder / MODEL)
    return Progress(settings=config.corpus_settings(), source=fingerprint, tokenizer_hash=tokenizer.hash)


def skip_finished(documents: "Iterable[Document]", finished: dict[str, int]) -> "Iterator[Document]":
    """The documents without the first `finished` ones of each split, whose shards are finished."""
    remaining = dict(finished)
    for document in documents:
        if remaining.get(document.split):
            remaining[document.split] -= 1
        else:
            yield document


def write_tokenizer(config: DataConfig, source: "Source", path: Path) -> "Tokenizer":
    """Writes to `path` a tokenizer trained on the training split, or a copy of the given model. Raises UserError."""
    from data.tokenizer import Tokenizer, train, write_atomic

    if config.tokenizer == "train":
        train(with_progress("reading for the tokenizer", source, source.training_texts()), config.vocab_size, path)
    else:
        write_atomic(path, Tokenizer(Path(config.tokenizer).expanduser()).path.read_bytes())
    return Tokenizer(path)


def with_progress(label: str, source: "Source", items: Iterable[T]) -> Iterator[T]:
    """The items, which are read from `source`; reports its position on stderr.

    On a terminal it shows a bar; elsewhere it prints a line for each quarter.
    """
    from tqdm import tqdm

    total = source.total
    printed_quarters = 0
    with tqdm(total=total, desc=label, unit=source.unit, unit_scale=True, disable=None, leave=False) as bar:
        for item in items:
            yield item
            position = source.position
            bar.update(position - bar.n)
            quarters = min(position * 4 // total, 3)
            if bar.disable and quarters > printed_quarters:
                printed_quarters = quarters
                print(f"{label}: {25 * quarters}%", file=sys.stderr)
        if bar.disable:
            print(f"{label}: done", file=sys.stderr)


def summarize(corpus: "Corpus", seconds: float) -> str:
    """One line about a corpus that was made in `seconds`."""
    train, validation = corpus.manifest.splits["train"], corpus.manifest.splits["validation"]
    text_bytes, tokens = train.text_bytes + validation.text_bytes, train.tokens + validation.tokens
    roundtrip_failures, empty = train.misses + validation.misses, corpus.manifest.empty
    return (
        f"{corpus.folder}: {train.documents:,} + {validation.documents:,} stories, {tokens:,} tokens, "
        f"{text_bytes / tokens:.2f} bytes per token, {roundtrip_failures} stories do not decode to themselves"
        f"{f', {empty} empty stories skipped' if empty else ''}; "
        f"{seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s"
    )


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        prog="python -m data.prepare",
        description="Prepare a corpus: read stories, train or copy a tokenizer, and write tokens to disk. "
        "Run the same command again to resume.",
        epilog=f"settings (section.key=default; other sections are ignored):\n{help_text({'data': DataConfig})}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file, such as launch/tiny.yaml")
    parser.add_argument("settings", metavar="section.key=value", nargs="*", help="override the file; the last one wins")
    start = time.monotonic()
    try:
        options = parser.parse_intermixed_args(argv)
        config: DataConfig = read({"data": DataConfig}, options.config, options.settings)["data"]
        corpus, is_new = prepare(config)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; {RESUME}", file=sys.stderr)
        return 130
    except OSError as error:  # such as a missing permission or a full disk
        place = error.filename or f"data.dir={config.dir}"
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = f"; free some space, then {RESUME}" if is_full else ""
        print(f"{place}: {error.strerror}{fix}", file=sys.stderr)
        return 2
    if is_new:
        print(summarize(corpus, time.monotonic() - start))
        print(f"next: torchrun --nproc_per_node=1 -m trainer.main {shlex.join(argv)}".rstrip())
    else:
        stories = sum(split.documents for split in corpus.manifest.splits.values())
        print(f"ready: {corpus.folder} already holds {stories:,} stories")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
