"""The `data` section of the settings. Imports no torch, so that a mistake in the settings is reported at once."""

from pydantic import Field, model_validator

from data.settings import Section

AUTO_HELD_OUT = 0.02


class DataConfig(Section):
    """Stories -> tokens on disk -> batches."""

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
    text_field: str = Field("text", description="the field of a row that holds the story (.jsonl, .parquet, hub)")
    clean: bool = Field(
        False, description="repair mojibake (`â€œ`), split texts at end-of-text marks inside; for TinyStories"
    )
    stories: int = Field(40_000, ge=1, description="number of stories that the storybook writes")
    dir: str = Field("corpus/storybook", description="folder of the prepared corpus")
    tokenizer: str = Field("train", description="`train`, or the path of a sentencepiece model")
    vocab_size: int = Field(1024, ge=261, le=1 << 24, description="vocabulary of the tokenizer to train")
    seq_len: int = Field(1024, ge=1, description="tokens a row (S)")
    pack: bool = Field(True, description="fill rows with stories end to end; false: one story a row, cut or padded")
    mask_documents: bool = Field(False, description="attend within a story only; positions restart at each story")
    shard_tokens: int = Field(50_000_000, ge=1, description="tokens in a shard file, at most (a whole story at least)")
    workers: int = Field(1, ge=0, le=64, description="threads that prepare batches ahead; 0: in the loop itself")

    @property
    def held_out(self) -> float | None:
        """The fraction of stories held out by hash, if any are; None where `validation` is a path."""
        if self.validation == "auto":
            return AUTO_HELD_OUT
        try:
            return float(self.validation)
        except ValueError:
            return None

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise ValueError(f"validation={self.validation}: a fraction lies between 0 and 1; or give a path")
        if self.source == "storybook" and self.held_out is None:
            raise ValueError(f"validation={self.validation}: the storybook holds out a fraction, such as 0.02")
        return self
