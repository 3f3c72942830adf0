"""The `data` section of the settings: where stories come from, how they are tokenized, and how batches are cut.

These settings are read before any story. This module does not import torch, so that a wrong setting is reported
immediately.
"""

from pydantic import Field, model_validator

from data.settings import Section

AUTO_HELD_OUT = 0.02  # fraction of the stories, for data.validation=auto without a validation split


class DataConfig(Section):
    """The settings for writing stories to disk as tokens, and for cutting batches from them."""

    source: str = Field(
        "storybook",
        description="`storybook`; a file, folder or glob (.jsonl, .parquet, .txt, also .gz); `tinystories` or another "
        "data set of the Hugging Face hub, `owner/name`, `owner/name:config`, either with `@revision`",
    )
    validation: str = Field(
        "auto",
        description="a path, or the fraction of training stories held out by hash; auto: the validation split of a hub "
        "data set that has one, else 0.02",
    )
    text_field: str = Field("text", description="the field that holds the story in each row (.jsonl, .parquet, hub)")
    clean: bool = Field(
        False,
        description="repair mojibake (`â€œ`) and split texts at end-of-text marks; made for TinyStories",
    )
    stories: int = Field(40_000, ge=1, description="number of stories that the storybook generates")
    dir: str = Field("corpus/storybook", description="folder of the prepared corpus")
    tokenizer: str = Field("train", description="`train`, or the path of a sentencepiece model")
    vocab_size: int = Field(1024, ge=261, le=1 << 24, description="vocabulary size of the tokenizer to train")
    seq_len: int = Field(1024, ge=1, description="tokens per row (S)")
    pack: bool = Field(
        True, description="concatenate stories to fill each row; false: one story per row, truncated or padded"
    )
    mask_documents: bool = Field(False, description="attend only within a story, and restart positions at each story")
    shard_tokens: int = Field(
        50_000_000, ge=1, description="most tokens in a shard file; a longer story gets a file of its own"
    )
    workers: int = Field(
        1, ge=0, le=64, description="threads that prepare batches in advance; 0: the training loop prepares them"
    )

    @property
    def held_out(self) -> float | None:
        """The fraction of stories to hold out by hash; None if `validation` is a path."""
        if self.validation == "auto":
            return AUTO_HELD_OUT
        try:
            return float(self.validation)
        except ValueError:
            return None

    def corpus_settings(self) -> dict[str, str | int | bool]:
        """The settings that determine the content of a corpus; the others may change from run to run."""
        keys = ["source"]
        keys += ["stories"] if self.source == "storybook" else ["text_field", "clean"]
        keys += ["validation", "tokenizer"]
        if self.tokenizer == "train":
            keys.append("vocab_size")
        keys.append("shard_tokens")
        return {key: getattr(self, key) for key in keys}

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise ValueError(f"validation={self.validation}: a fraction must be between 0 and 1; or give a path")
        if self.source == "storybook" and self.held_out is None:
            raise ValueError(f"validation={self.validation}: the storybook needs a fraction, such as 0.02")
        return self
