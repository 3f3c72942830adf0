"""A source of stories in a data set of the Hugging Face hub.

1. The revision (`main` if none is given) is resolved to a commit first, so that a wrong name or a missing network is
   reported before anything else. The commit is the source's `fingerprint` (base.py).
2. `datasets` downloads that commit and stores it as Arrow files, which are mapped into memory. Streaming would need no
   disk space, but a corpus reads its source twice, for the tokenizer and for the tokens: this way the second pass needs
   no network, and the order and the number of rows are those of a file.
3. The number of rows is compared with the number that the data set declares. Code of a data set is never run; from 4.0
   on, `datasets` cannot run any.

The token, the endpoint and the cache are set by the environment variables of Hugging Face (HF_TOKEN, HF_ENDPOINT,
HF_HOME).
"""

import errno
import logging.handlers
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.settings import UserError
from data.sources.base import TRAIN, VALIDATION, Document, split_of
from data.sources.clean import SEPARATOR, Cleaner
from data.sources.files import (
    BATCH_ROWS,
    DOWNLOAD_AGAIN,
    SUPPORTED_FILES,
    FileSource,
    check_field,
    find_files,
    is_story_file,
    texts_of,
)

TINYSTORIES = "roneneldan/TinyStories"
HUB_TIMEOUT_S = 12.0  # for the first answer, including name resolution and connecting, which have other time limits
LOCAL_SOURCES = f"`storybook` or a file, folder or glob ({SUPPORTED_FILES}), which need no network"


class HubSource:
    """The stories of a data set of the hub. `total` and `position` count rows."""

    unit = " stories"

    def __init__(self, config: DataConfig, name: str, config_name: str | None, revision: str | None) -> None:
        """Raises UserError if there is no such data set, or if the hub does not answer."""
        self.setting = f"data.source={config.source}"
        self.name, self.config_name = TINYSTORIES if name == "tinystories" else name, config_name
        self.held_out, self.text_field, self.clean = config.held_out, config.text_field, config.clean
        self.splits_to_read = [TRAIN, VALIDATION] if config.validation == "auto" else [TRAIN]
        self.validation_files: FileSource | None = None
        if config.held_out is None:
            find_files("data.validation", config.validation)  # an error about the path names this setting
            file_config = config.model_copy(update={"source": config.validation, "validation": "auto"})
            self.validation_files = FileSource(file_config)
        self.commit = self._resolve(revision)
        self.position = self.empty = 0
        self.cleaner = Cleaner()
        self._splits: dict[str, Any] = {}

    def _resolve(self, revision: str | None) -> str:
        """The commit of a revision."""
        from huggingface_hub import HfApi, errors

        answers: list[Any] = []

        def request() -> None:
            try:
                answers.append(HfApi().dataset_info(self.name, revision=revision, timeout=HUB_TIMEOUT_S).sha)
            except Exception as error:
                answers.append(error)

        thread = threading.Thread(target=request, daemon=True)
        thread.start()
        thread.join(HUB_TIMEOUT_S)
        answer = answers[0] if answers else TimeoutError(f"no answer in {HUB_TIMEOUT_S:.0f} s")
        if isinstance(answer, str):
            return answer
        match answer:
            case errors.GatedRepoError():
                problem = (
                    f"its owner grants access on request; request it on the page of {self.name} on the hub, "
                    "and set HF_TOKEN"
                )
            case errors.RepositoryNotFoundError() | errors.HFValidationError():
                problem = (
                    f"no such file or folder, and no data set {self.name} on the hub that you may read "
                    f"(a private one needs HF_TOKEN); or give {LOCAL_SOURCES}"
                )
            case errors.RevisionNotFoundError():
                problem = f"the data set has no revision {revision}; give a branch, tag or commit, or omit the @"
            case errors.OfflineModeIsEnabled():
                problem = f"HF_HUB_OFFLINE is set; unset it, or give {LOCAL_SOURCES}"
            case _:
                problem = (
                    f"the hub did not answer ({type(answer).__name__}: {_first_line(answer)}); "
                    f"check the network and try again, or give {LOCAL_SOURCES}"
                )
        raise UserError(f"{self.setting}: {problem}")

    def fingerprint(self) -> dict[str, str]:
        """The commit, and the validation files if there are any."""
        fingerprint = {self.name: f"commit {self.commit}"}
        if self.validation_files:
            for name, content in self.validation_files.fingerprint().items():
                fingerprint[f"validation {name}"] = content
        return fingerprint

    @property
    def total(self) -> int:
        return sum(split.num_rows for split in self._load().values())

    def training_texts(self) -> Iterator[str]:
        """The texts of the training split."""
        return (document.text for document in self if document.split == TRAIN)

    def __iter__(self) -> Iterator[Document]:
        """All documents. Raises UserError if a row has no text, or if the number of rows is not the declared one."""
        splits = self._load()
        self.position = self.empty = 0
        self.cleaner = Cleaner()
        for name, split in splits.items():
            rows = self._rows(name, split)
            for text in self.cleaner(rows) if self.clean else rows:
                if not text.strip():
                    self.empty += 1
                elif VALIDATION in splits or self.held_out is None:
                    yield Document(name, text)
                else:
                    yield Document(split_of(text, self.held_out), text)
        if self.validation_files:
            for document in self.validation_files:
                yield document._replace(split=VALIDATION)
            self.empty += self.validation_files.empty
            self.cleaner.add(self.validation_files.cleaner)

    def _rows(self, name: str, split: Any) -> Iterator[str]:
        """The texts of a split."""
        where = f"{self.name}, {name}"
        rows = 0
        for table in split.iter(BATCH_ROWS):
            for text in texts_of(where, rows + 1, table, self.text_field):
                if text == SEPARATOR:
                    raise UserError(
                        f"{where}: a row contains only {SEPARATOR}, so rows are lines, not stories; "
                        "download the file and give its path"
                    )
                self.position += 1
                yield text
            rows += table.num_rows
        declared = split.info.splits[name].num_examples
        if rows != declared:
            raise UserError(f"{where}: read {rows} rows, but the data set declares {declared}; {self._retry()}")

    def _load(self) -> dict[str, Any]:
        """The splits to read. Downloads them on the first call, unless they are in the cache."""
        if not self._splits:
            available = self._download()
            if TRAIN not in available:
                raise UserError(
                    f"{self.setting}: the data set has no split {TRAIN}, only {', '.join(available)}; "
                    "give another data set, or download its files and give their path"
                )
            for name in self.splits_to_read:
                if name in available:
                    check_field(f"{self.name}, {name}", self.text_field, available[name].features.arrow_schema)
                    self._splits[name] = available[name].select_columns([self.text_field]).with_format("arrow")
        return self._splits

    def _download(self) -> Any:
        """All splits of the commit, by name."""
        import datasets
        from datasets.exceptions import NonMatchingSplitsSizesError

        # The client's log names the damaged file, its exceptions do not. A level that never occurs: keep all records.
        log = logging.handlers.MemoryHandler(100, logging.CRITICAL + 1)
        for logger in ("datasets", "huggingface_hub"):
            logging.getLogger(logger).handlers = [log]
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        try:
            builder = datasets.load_dataset_builder(self.name, self.config_name, revision=self.commit)
        except Exception as error:
            if isinstance(error, ValueError) and "config" in str(error).lower():  # its second line lists the configs
                problem = " ".join(str(error).splitlines()[:2])
                raise UserError(f"{self.setting}: {problem}; write {self.name}:CONFIG") from None
            raise UserError(f"{self.setting}: {_first_line(error)}; give another data set, or files") from None
        if builder.hash != self.commit:  # if the hub does not answer, the client uses another commit from the cache
            raise UserError(
                f"{self.setting}: commit {self.commit} is not in the cache, and the hub did not answer; try again"
            )
        declared = ", ".join(f"{name}: {split.num_examples}" for name, split in (builder.info.splits or {}).items())
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # about a full disk: reported below
                builder.download_and_prepare()
            return builder.as_dataset()
        except NonMatchingSplitsSizesError:
            raise UserError(
                f"{self.setting}: the number of rows differs from the declared number ({declared}); {self._retry()}"
            ) from None
        except Exception as error:
            cause = _root_cause(error)
            error_number = getattr(cause, "errno", None)
            if error_number in (errno.ENOSPC, errno.EDQUOT):
                cache = datasets.config.HF_CACHE_HOME
                raise UserError(
                    f"{self.setting}: {cache} is full; free some space there, or set HF_HOME to a larger disk"
                ) from None
            logged = [record.getMessage() for record in log.buffer if record.levelno >= logging.ERROR]
            problem = logged[-1] if logged else _first_line(cause)
            problem = problem.partition("\n")[0].rstrip(".")
            if error_number is None:
                problem = self._find_damage(builder.config.data_files) or problem
            raise UserError(f"{self.setting}: {problem}; {self._retry()}") from None

    def _find_damage(self, data_files: dict[str, list[str]]) -> str | None:
        """The first downloaded file that FileSource cannot read, and the problem.

        The errors of the client do not name a file that cannot be decompressed.
        """
        from huggingface_hub import try_to_load_from_cache

        names = [url.partition(f"@{self.commit}/")[2] for files in data_files.values() for url in files]
        paths = [try_to_load_from_cache(self.name, n, revision=self.commit, repo_type="dataset") for n in names]
        if not all(isinstance(path, str) for path in paths):
            return None  # it failed before all files were downloaded
        for name, path in zip(names, map(str, paths), strict=True):
            if not is_story_file(Path(name)):
                continue
            try:
                for _ in FileSource(DataConfig(source=path, text_field=self.text_field)):
                    pass
            except UserError as error:
                return str(error).replace(path, name).removesuffix(f"; {DOWNLOAD_AGAIN}")
        return None

    def _retry(self) -> str:
        """What to do about a failed download."""
        import datasets

        return f"try again; if that does not help, delete its files in {datasets.config.HF_CACHE_HOME}"


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().partition("\n")[0]
