"""The first step of the journey, where the stories lie on the Hugging Face hub: a data set -> one stream of documents.

1. The name's revision (`main` without one) is resolved to a commit at once, so that a wrong name or no network shows
   before anything else; the commit is the fingerprint.
2. `datasets` downloads that commit and keeps it as Arrow files, which are mapped into memory. Streaming would take no
   disk, but a corpus reads its source twice, for the tokenizer and for the tokens: this way the second pass needs no
   network, and the order and the number of rows are those of a file.
3. Rows are counted against what the data set says. Code of a data set is never run: from 4.0 on `datasets` cannot.

Tokens and endpoints are the business of huggingface's own environment variables (HF_TOKEN, HF_ENDPOINT, HF_HOME).
"""

import errno
import logging.handlers
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.settings import UserError
from data.sources.base import TRAIN, VALIDATION, Document, side
from data.sources.clean import SEPARATOR, Cleaner
from data.sources.files import BATCH_ROWS, READABLE, Files, check_field, find, readable, rows_of

TINYSTORIES = "roneneldan/TinyStories"
PATIENCE = 12.0  # seconds for the first answer; name servers and dead addresses have time limits of their own
OTHERS = f"`storybook`, or a file, folder or glob ({READABLE}),"


class Hub:
    """The stories of a data set on the hub.

    `total` and `position` count its rows, `empty` the blank ones passed over, `cleaner` what was repaired.
    """

    unit = " stories"

    def __init__(self, config: DataConfig, name: str, config_name: str | None, revision: str | None) -> None:
        """Raises UserError when there is no such data set, or nobody to ask."""
        self.given = f"data.source={config.source}"
        self.name, self.config_name = TINYSTORIES if name == "tinystories" else name, config_name
        self.held_out, self.text_field, self.clean = config.held_out, config.text_field, config.clean
        self.own_validation = config.validation == "auto"  # until it turns out to have none
        self.beside = None  # validation stories in files
        if config.held_out is None:
            find("data.validation", config.validation)
            self.beside = Files(config.model_copy(update={"source": config.validation, "validation": "auto"}))
        self.commit = self._resolve(revision)
        self.position = self.empty = 0
        self.cleaner = Cleaner()
        self._splits: dict[str, Any] = {}

    def _resolve(self, revision: str | None) -> str:
        """The commit that a revision means."""
        from huggingface_hub import HfApi, errors

        answer: list[Any] = []

        def ask() -> None:
            try:
                answer.append(HfApi().dataset_info(self.name, revision=revision, timeout=PATIENCE).sha)
            except Exception as error:
                answer.append(error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(PATIENCE)
        result = answer[0] if answer else TimeoutError(f"no answer in {PATIENCE:.0f} s")
        if isinstance(result, str):
            return result
        match result:
            case errors.GatedRepoError():
                why = f"its owner grants access one by one; ask at the hub's page of {self.name} and set HF_TOKEN"
            case errors.RepositoryNotFoundError() | errors.HFValidationError():
                why = (
                    f"no such file or folder, and no data set {self.name} on the hub that you may read "
                    f"(a private one wants HF_TOKEN); {OTHERS} works without"
                )
            case errors.RevisionNotFoundError():
                why = f"the data set has no revision {revision}; give a branch, tag or commit, or leave the @ away"
            case errors.OfflineModeIsEnabled():
                why = f"HF_HUB_OFFLINE is set; unset it, or give {OTHERS} which works without"
            case _:
                why = (
                    f"the hub gives no answer ({type(result).__name__}: {_line(result)}); "
                    f"try again with a network, or give {OTHERS} which works without"
                )
        raise UserError(f"{self.given}: {why}")

    def fingerprint(self) -> dict[str, str]:
        """The commit, and the files of a validation path."""
        beside = self.beside.fingerprint() if self.beside else {}
        return {self.name: f"commit {self.commit}"} | {f"validation {name}": is_ for name, is_ in beside.items()}

    @property
    def total(self) -> int:
        return sum(split.num_rows for split in self._load().values())

    def training_texts(self) -> Iterator[str]:
        """What to train a tokenizer on."""
        return (document.text for document in self if document.split == TRAIN)

    def __iter__(self) -> Iterator[Document]:
        """Raises UserError when there is no text in a row, or not as many rows as the data set says."""
        splits = self._load()
        self.position = self.empty = 0
        self.cleaner = Cleaner()
        for name, split in splits.items():
            rows = self._rows(name, split)
            for text in self.cleaner(rows) if self.clean else rows:
                if not text.strip():
                    self.empty += 1
                elif VALIDATION in splits or self.held_out is None:
                    yield Document(name, text, None)
                else:
                    yield Document(side(text, self.held_out), text, None)
        if self.beside:
            for document in self.beside:
                yield document._replace(split=VALIDATION)
            self.empty += self.beside.empty
            self.cleaner.add(self.beside.cleaner)

    def _rows(self, name: str, split: Any) -> Iterator[str]:
        seen, where = 0, f"{self.name}, {name}"
        for table in split.iter(BATCH_ROWS):
            for text in rows_of(where, seen, table, self.text_field):
                if text == SEPARATOR:
                    raise UserError(
                        f"{where}: a row is nothing but {SEPARATOR}, so rows are lines and no stories; "
                        "download the file and give its path"
                    )
                self.position += 1
                yield text
            seen += table.num_rows
        if seen != (said := split.info.splits[name].num_examples):
            raise UserError(f"{where}: {seen} rows came where the data set says {said}; {self._again()}")

    def _load(self) -> dict[str, Any]:
        """The splits to read, downloaded where they are not yet."""
        if not self._splits:
            found = self._download()
            wanted = [TRAIN, VALIDATION] if self.own_validation else [TRAIN]
            if TRAIN not in found:
                raise UserError(f"{self.given}: the data set has no split train, but {', '.join(found)}")
            for name in wanted:
                if name in found:
                    check_field(f"{self.name}, {name}", self.text_field, found[name].features.arrow_schema)
                    self._splits[name] = found[name].select_columns([self.text_field]).with_format("arrow")
        return self._splits

    def _download(self) -> Any:
        """All splits of the commit, by name."""
        import datasets
        from datasets.exceptions import NonMatchingSplitsSizesError

        told = logging.handlers.MemoryHandler(100, logging.CRITICAL + 1)  # names a file, which the error does not
        logging.getLogger("datasets").handlers = logging.getLogger("huggingface_hub").handlers = [told]
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        try:
            builder = datasets.load_dataset_builder(self.name, self.config_name, revision=self.commit)
        except Exception as error:
            if isinstance(error, ValueError) and "config" in str(error).lower():  # its second line lists them
                why = " ".join(str(error).splitlines()[:2])
                raise UserError(f"{self.given}: {why}; write {self.name}:CONFIG") from None
            raise UserError(f"{self.given}: {_line(error)}; give another data set, or files") from None
        if builder.hash != self.commit:  # without an answer it takes what the cache holds
            raise UserError(
                f"{self.given}: commit {self.commit} is not at hand, and the hub gives no answer; try again"
            )
        said = ", ".join(f"{name}: {split.num_examples}" for name, split in (builder.info.splits or {}).items())
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a full disk, which we report
                builder.download_and_prepare()
            return builder.as_dataset()
        except NonMatchingSplitsSizesError:
            raise UserError(f"{self.given}: not as many rows came as it says ({said}); {self._again()}") from None
        except Exception as error:
            errors = [record.getMessage() for record in told.buffer if record.levelno >= logging.ERROR]
            why = (errors or [_line(_root(error))])[-1].partition("\n")[0].rstrip(".")
            match getattr(_root(error), "errno", None):
                case None:
                    why = self._damage(builder.config.data_files) or why
                case errno.ENOSPC | errno.EDQUOT:
                    room = f"{datasets.config.HF_CACHE_HOME} is full; make room there, or set HF_HOME to a larger disk"
                    raise UserError(f"{self.given}: {room}") from None
            raise UserError(f"{self.given}: {why}; {self._again()}") from None

    def _damage(self, data_files: dict[str, list[str]]) -> str | None:
        """The first file that our own readers cannot read, and why: the client names no file that will not unpack."""
        from huggingface_hub import try_to_load_from_cache

        names = [url.partition(f"@{self.commit}/")[2] for files in data_files.values() for url in files]
        paths = [try_to_load_from_cache(self.name, n, revision=self.commit, repo_type="dataset") for n in names]
        if not all(isinstance(path, str) for path in paths):
            return None  # it ended before all were here
        for name, path in zip(names, map(str, paths), strict=True):
            try:
                if readable(Path(name)):
                    deque(Files(DataConfig(source=path, text_field=self.text_field)), 0)
            except UserError as error:
                return str(error).replace(path, name).removesuffix("; fetch it anew")
        return None

    def _again(self) -> str:
        import datasets

        return f"try again; if it stays, delete what is left of it in {datasets.config.HF_CACHE_HOME}"


def _root(error: BaseException) -> BaseException:
    while inner := error.__cause__:
        error = inner
    return error


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().partition("\n")[0]
