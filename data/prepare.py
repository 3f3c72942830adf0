"""The command that makes a corpus: source -> tokenizer -> shards -> manifest.

    python -m data.prepare [--config FILE] [section.key=value ...]

1. A finished corpus is left as it is: "ready" when settings and source are what it was made of, refused otherwise.
   An interrupted run goes on after its last finished shard, if settings and source are still the same, else anew.
2. The tokenizer is trained on the training split, or copied from the path given.
3. Stories are encoded by all cores, those that would not decode to themselves are counted, and written to shards.
4. The manifest, written last, makes it a corpus.
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

if TYPE_CHECKING:  # at run time inside the functions: numpy and sentencepiece would slow down --help
    from data.shards import Corpus, Manifest, Progress
    from data.sources.base import Document, Source
    from data.tokenizer import Tokenizer

T = TypeVar("T")


def prepare(config: DataConfig) -> tuple["Corpus", bool]:
    """The corpus that the settings ask for, and whether it had to be made. Raises UserError."""
    from data.shards import Corpus
    from data.sources.open import open_source

    folder = Path(config.dir)
    if corpus := finished(config, folder):
        return corpus, False
    source = open_source(config)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        if corpus := finished(config, folder):  # made by the one we waited for
            return corpus, False
        make(config, source, folder)
    return Corpus.open(folder), True


def finished(config: DataConfig, folder: Path) -> "Corpus | None":
    """The corpus in `folder`, None when it is not finished. Raises UserError when it was made of anything else."""
    from data.shards import MANIFEST, Corpus
    from data.sources.open import open_source

    if not (folder / MANIFEST).exists():
        return None
    corpus = Corpus.open(folder)
    made = corpus.manifest
    changed = changes(made, config, made.source)
    if not changed:
        corpus.check(config)  # a given tokenizer may have changed under its name
        try:
            changed = changes(made, config, open_source(config).fingerprint())
        except UserError:  # many delete the stories once they are tokens
            print(f"data.source={config.source}: not there any more; the corpus stands for it", file=sys.stderr)
    if changed:
        raise UserError(
            f"data.dir={folder}: the corpus there was made of something else ({changed}); "
            "give another data.dir, or delete that folder"
        )
    return corpus


def changes(made: "Manifest | Progress", config: DataConfig, source: dict[str, str]) -> str:
    """What a corpus, whole or begun, was made of and is asked to be now, where they differ; empty if nowhere."""
    from data.shards import differences, settings_of

    found = [f"data.{key} {old} -> {new}" for key, old, new in differences(made.settings, settings_of(config))]
    found += [f"{key}: {old} -> {new}" for key, old, new in differences(made.source, source)]
    return "; ".join(found[:3]) + ("; ..." if found[3:] else "")


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
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
    from data.encode import encode
    from data.shards import MANIFEST, MODEL, PROGRESS, Manifest, Writer, settings_of
    from data.sources.base import TRAIN, VALIDATION
    from data.tokenizer import Tokenizer, write_atomic

    fingerprint = source.fingerprint()
    progress = begin(config, source, folder, fingerprint)
    tokenizer = Tokenizer(folder / MODEL)
    past = {name: info.documents for name, info in progress.splits.items()}
    if any(past.values()):
        print(f"data.dir={folder}: going on after {sum(past.values()):,} stories", file=sys.stderr)

    writers: dict[str, Writer] = {}

    def save() -> None:
        progress.splits.update({name: writer.done for name, writer in writers.items()})
        write_atomic(folder / PROGRESS, progress.model_dump_json(indent=1).encode())

    with contextlib.ExitStack() as stack:
        for name in (TRAIN, VALIDATION):
            writer = Writer(folder, name, tokenizer, config.shard_tokens, progress.splits.get(name), save)
            writers[name] = stack.enter_context(writer)
        save()
        encoded = encode(skip(watched("encoding", source, source), past), tokenizer)
        with contextlib.closing(encoded):
            for story in encoded:
                writers[story.split].add(story.ids, story.text_bytes, story.log_prob, story.missed)
    if source.fingerprint() != fingerprint:
        raise UserError(f"data.source={config.source}: it changed while it was read; the same command begins anew")
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
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    (folder / PROGRESS).unlink(missing_ok=True)


def begin(config: DataConfig, source: "Source", folder: Path, fingerprint: dict[str, str]) -> "Progress":
    """How far an interrupted run came with the same settings and source; else a new beginning, with a tokenizer.

    Raises UserError.
    """
    from data.shards import MODEL, PROGRESS, Progress, settings_of
    from data.sources.base import TRAIN, VALIDATION
    from data.tokenizer import Tokenizer

    given = folder / MODEL if config.tokenizer == "train" else Path(config.tokenizer).expanduser()
    try:
        old = Progress.model_validate_json((folder / PROGRESS).read_bytes())
        changed = changes(old, config, fingerprint)
        if not changed and old.tokenizer_hash == Tokenizer(folder / MODEL).hash == Tokenizer(given).hash:
            return old
        changed = changed or "the tokenizer"
        print(f"data.dir={folder}: begun of something else ({changed}); beginning anew", file=sys.stderr)
    except (OSError, ValueError, UserError):
        pass  # none, or not whole
    (folder / PROGRESS).unlink(missing_ok=True)
    for name in (TRAIN, VALIDATION):
        for left in folder.glob(f"{name}-*.shard*"):
            left.unlink()
    tokenizer = make_tokenizer(config, source, folder / MODEL)
    return Progress(settings=settings_of(config), source=fingerprint, tokenizer_hash=tokenizer.hash)


def skip(documents: "Iterable[Document]", past: dict[str, int]) -> "Iterator[Document]":
    """The documents without the first of each split, whose shards are finished."""
    left = dict(past)
    for document in documents:
        if left.get(document.split):
            left[document.split] -= 1
        else:
            yield document


def make_tokenizer(config: DataConfig, source: "Source", path: Path) -> "Tokenizer":
    """Trains on the training split, or copies the given model, to `path`. Raises UserError."""
    from data.tokenizer import Tokenizer, train, write_atomic

    if config.tokenizer == "train":
        train(watched("reading for the tokenizer", source, source.training_texts()), config.vocab_size, path)
    else:
        write_atomic(path, Tokenizer(Path(config.tokenizer).expanduser()).path.read_bytes())
    return Tokenizer(path)


def watched(what: str, source: "Source", items: Iterable[T]) -> Iterator[T]:
    """The items of a source, with a bar on a terminal or a line for each quarter elsewhere, on stderr."""
    from tqdm import tqdm

    told, total = 0, source.total  # quarters
    with tqdm(total=total, desc=what, unit=source.unit, unit_scale=True, disable=None, leave=False) as bar:
        for item in items:
            yield item
            position = source.position
            bar.update(position - bar.n)
            quarter = min(position * 4 // total, 3)
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
        print("\ninterrupted; the same command goes on after the last finished shard", file=sys.stderr)
        return 130
    except OSError as error:  # no permission, disk full
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "; make room: the same command goes on after the last finished shard" if full else ""
        print(f"{error.filename or f'data.dir={config.dir}'}: {error.strerror}{fix}", file=sys.stderr)
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
