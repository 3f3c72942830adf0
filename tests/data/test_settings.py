from pathlib import Path
from typing import Annotated, ClassVar

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from data.config import DataConfig
from data.settings import SECTIONS, ConfigError, Section, UserError, dump, help_text, key_table, read


class Train(Section):
    """A section like those of other packages, with a key of each type."""

    mutually_exclusive: ClassVar[tuple[str, ...]] = ("steps", "epochs")
    steps: int | None = Field(None, ge=1, description="optimizer steps")
    epochs: float | None = Field(None, gt=0, description="passes over the corpus")
    max_lr: float = Field(6e-4, gt=0, description="highest rate")
    compile: bool = False
    name: str = "run"
    schedule: Annotated[str, Field(pattern="^(cosine|linear)$")] = "cosine"
    replicate: int | str = 1
    prompts: tuple[str, ...] = ("Once",)

    @model_validator(mode="after")
    def _check(self) -> "Train":
        if self.steps and self.epochs:
            raise ValueError("steps and train.epochs: give one of them")
        return self


KNOWN: dict[str, type[Section]] = {"data": DataConfig, "train": Train}
DEFAULT = DataConfig.model_validate({})


def train_of(*arguments: str, file: str = "", folder: Path | None = None) -> Train:
    path = None
    if folder:
        path = folder / "c.yaml"
        path.write_text(file, encoding="utf-8")
    return read(KNOWN, path, arguments)["train"]


def refusal(*arguments: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        read(KNOWN, path, arguments)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)
    return str(error.value)


def refusal_of(folder: Path, content: str | bytes) -> str:
    """The error message about a file with this content, without the file's name at its beginning."""
    path = folder / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return refusal(path=path).removeprefix(str(path))


def test_no_settings_give_the_defaults():
    config = read(KNOWN, None)
    assert config == {"data": DEFAULT, "train": Train.model_validate({})}
    assert config["data"].source == "storybook" and config["data"].held_out == 0.02


@pytest.mark.parametrize("text", ["6e-4", "6E-4", "0.0006", ".0006", "+6e-4", "6.0e-4"])
def test_numbers_may_be_written_in_any_notation(tmp_path, text):
    assert train_of(f"train.max_lr={text}").max_lr == 6e-4
    assert train_of(file=f"train:\n  max_lr: {text}\n", folder=tmp_path).max_lr == 6e-4
    assert train_of(file="train: {max_lr: 1e-8}", folder=tmp_path).max_lr == 1e-8


def test_text_stays_text(tmp_path):
    for name in ("007", "1e3", "true", "null x", "2024-01-01", "0x10", "yes", "1_000"):
        assert train_of(f"train.name={name}").name == name
        assert train_of(file=f"train:\n  name: {name}\n", folder=tmp_path).name == name
    assert train_of("train.name=a=b").name == "a=b"
    assert read(KNOWN, None, ["data.validation=0.1"])["data"].validation == "0.1"


def test_booleans_and_null(tmp_path):
    for text, value in [("true", True), ("false", False), ("True", True), ("1", True), ("0", False), ("no", False)]:
        assert train_of(f"train.compile={text}").compile is value
        assert train_of(file=f"train: {{compile: {text}}}", folder=tmp_path).compile is value
    for text in ("null", "~", ""):
        assert train_of("train.steps=5", f"train.steps={text}").steps is None
        assert train_of(file=f"train:\n  steps: {text}\n", folder=tmp_path).steps is None


def test_lists_are_read_as_tuples_of_text(tmp_path):
    assert train_of("train.prompts=[Once upon, 7]").prompts == ("Once upon", "7")
    assert train_of("train.prompts=[]").prompts == ()
    assert train_of(file="train:\n  prompts: [a, 6e-4]\n", folder=tmp_path).prompts == ("a", "6e-4")


def test_the_last_value_of_a_key_wins(tmp_path):
    assert train_of("train.name=a", "train.name=b").name == "b"
    assert train_of(file="train: {name: a, name: b}", folder=tmp_path).name == "b"
    assert train_of("train.name=c", file="train: {name: a}", folder=tmp_path).name == "c"


def test_a_later_alternative_replaces_an_earlier_one(tmp_path):
    file = "train: {epochs: 2}"
    config = train_of("train.steps=7", file=file, folder=tmp_path)
    assert (config.steps, config.epochs) == (7, None)
    config = train_of("train.steps=7", "train.epochs=3", file=file, folder=tmp_path)
    assert (config.steps, config.epochs) == (None, 3)
    config = train_of("train.epochs=0.5", file="train: {steps: 9}", folder=tmp_path)
    assert (config.steps, config.epochs) == (None, 0.5)
    assert refusal_of(tmp_path, "train: {steps: 9, epochs: 2}") == "train.steps and train.epochs: give one of them"


def test_sections_of_other_packages_are_ignored(tmp_path):
    arguments = ["model.dim=64", "run.name=x", "train.nonsense=1"]
    (tmp_path / "c.yaml").write_text("model: {what: ever}\nlog: {every: 1}\ndata: {vocab_size: 300}\n")
    assert read({"data": DataConfig}, tmp_path / "c.yaml", arguments)["data"].vocab_size == 300


def test_empty_files_and_sections_give_the_defaults(tmp_path):
    for content in ("", "\n", "# nothing\n", "train:\n", "train: {}\n", "---\n", "\ufefftrain: {}\n"):
        assert train_of(file=content, folder=tmp_path) == Train.model_validate({})


@pytest.mark.parametrize(
    "argument, message",
    [
        ("data.vocab_sise=9", "data.vocab_sise: unknown key; did you mean data.vocab_size?"),
        ("data.qqqqqqqqq=9", "data.qqqqqqqqq: unknown key; known: source, validation, text_field"),
        ("dta.seq_len=9", "dta.seq_len: unknown key; did you mean data?"),
        ("nowhere.at_all=9", f"nowhere.at_all: unknown key; known: {', '.join(SECTIONS)}"),
        ("data.seq_len.more=9", "data.seq_len="),
        ("data.seq_len=many", "data.seq_len=many: should be an integer"),
        ("data.seq_len=1.5", "data.seq_len=1.5: should be an integer"),
        ("data.seq_len=0", "data.seq_len=0: should be greater than or equal to 1"),
        ("data.vocab_size=260", "data.vocab_size=260: should be greater than or equal to 261"),
        ("data.workers=65", "data.workers=65: should be less than or equal to 64"),
        ("data.seq_len=", "data.seq_len=null: should be an integer"),
        ("data.seq_len=[1]", "data.seq_len=['1']: should be an integer"),
        ("data.pack=maybe", "data.pack=maybe: should be true or false"),
        ("data.source=", "data.source=null: should be a"),
        ("data.validation=1.5", "data.validation=1.5: a fraction must be between 0 and 1; or give a path"),
        ("data.validation=0", "data.validation=0: a fraction must be between 0 and 1"),
        ("data.validation=nan", "data.validation=nan: a fraction must be between 0 and 1"),
        ("data.validation=held.txt", "data.validation=held.txt: the storybook needs a fraction"),
        ("train.max_lr=fast", "train.max_lr=fast: should be a number"),
        ("train.max_lr=0", "train.max_lr=0: should be greater than 0"),
        ("train.max_lr=nan", "train.max_lr=nan: should be"),
        ("train.schedule=step", "train.schedule=step: "),
        ("train.replicate=[1]", "train.replicate=['1']: should be an integer or should be a"),
        ("train.prompts=one", "train.prompts=one: should be a"),
        ("train.prompts=[one", "train.prompts=[one: the value is not valid YAML"),
        ("seq_len=9", "seq_len=9: not a setting; write section.key=value, such as train.steps=100"),
        ("data.seq_len", "data.seq_len: not a setting; write section.key=value"),
        ("--dim=9", "--dim=9: not a setting"),
        (".=9", ".=9: not a setting"),
        ("data.=9", "data.=9: not a setting"),
        ("", ": not a setting"),
    ],
)
def test_a_bad_argument_gives_one_line_with_key_value_and_fix(argument, message):
    assert refusal(argument).startswith(message)


@pytest.mark.parametrize(
    "content, message",
    [
        ("data: {vocab_sise: 9}", "data.vocab_sise: unknown key; did you mean data.vocab_size?"),
        ("dta: {seq_len: 9}", ": dta: unknown key; did you mean data?"),
        ("data: {seq_len: many}", "data.seq_len=many: should be an integer"),
        ("data: {seq_len: {a: 1}}", "data.seq_len={'a': '1'}: should be an integer"),
        ("data: 7", ": data: should be a map of keys and values"),
        ("data: [a]", ": data: should be a map of keys and values"),
        ("- data", f": should be a map of sections ({', '.join(SECTIONS)})"),
        ("words", ": should be a map of sections"),
        ("data: {seq_len: 9", ", line 1: not valid YAML: "),
        ("data:\n  seq_len: 9\n bad", ", line 3: not valid YAML: "),
        ("data:\n\tseq_len: 9", ", line 2: not valid YAML: "),
        ("data: {seq_len: *x}", ", line 1: not valid YAML: "),
        ("a: 1\n---\nb: 2", ", line 2: not valid YAML: "),
        ("7: {a: b}", ": 7: unknown key; known: "),
        ("? [data]\n: 1", ", line 1: not valid YAML: "),
        (b"data: {dir: caf\xe9}", ": cannot be read ("),
        ("data: {dir: \0}", ", line 1: not valid YAML: "),
        ("data: {1: 2}", "data.1: unknown key; known: source"),
        ("data: {~: 2}", "data.None: unknown key; known: source"),
        ("~: {a: 2}", ": None: unknown key; known: "),
    ],
)
def test_a_bad_file_gives_one_line(tmp_path, content, message):
    assert refusal_of(tmp_path, content).startswith(message)


def test_an_error_about_a_missing_file_names_its_neighbors(tmp_path):
    assert refusal(path=tmp_path / "tiny.yaml").endswith("tiny.yaml: no such config file; see launch/ for examples")
    (tmp_path / "scout.yaml").touch()
    assert refusal(path=tmp_path / "tiny.yaml").endswith("no such config file; that folder holds scout.yaml")
    assert refusal(path=tmp_path).startswith(f"{tmp_path}: cannot be read (")


def test_yaml_runs_no_code(tmp_path):
    tag = f"!!python/object/apply:os.system ['touch {tmp_path}/hacked']"
    refusal_of(tmp_path, f"data: {tag}")
    refusal_of(tmp_path, f"data: {{seq_len: {tag}}}")
    assert not (tmp_path / "hacked").exists()


def test_a_config_is_immutable():
    with pytest.raises(ValueError, match="frozen"):
        DEFAULT.seq_len = 3


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)


@settings(max_examples=100, deadline=None)
@given(
    max_lr=st.floats(min_value=1e-300, max_value=1e300),
    steps=st.none() | st.integers(1, 10**15),
    name=TEXT | st.sampled_from(["", "null", "~", "true", "7", "6e-4", "[a]", "a: b", "# a", " a ", "'", "a\nb\n"]),
    prompts=st.lists(TEXT).map(tuple),
    compile=st.booleans(),
    replicate=st.integers() | st.sampled_from(["auto", "7"]),
)
def test_reading_restores_dumped_settings(tmp_path_factory, **values):
    config = {"data": DataConfig.model_validate({"validation": "0.25"}), "train": Train.model_validate(values)}
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    restored = read(KNOWN, path)
    assert restored["data"] == config["data"]
    expected, found = config["train"].model_dump(), restored["train"].model_dump()
    assert str(found.pop("replicate")) == str(expected.pop("replicate"))  # an integer may come back as text
    assert found == expected
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == {"data", "train"}


def test_every_key_has_a_description_and_a_typable_default():
    table = key_table({"data": DataConfig})
    assert [key for key, _, _ in table] == [f"data.{name}" for name in DataConfig.model_fields]
    assert all(description for _, _, description in table)
    assert read(KNOWN, None, [f"{key}={default}" for key, default, _ in table])["data"] == DEFAULT
    shown = help_text(KNOWN).splitlines()
    assert len(shown) == len(DataConfig.model_fields) + len(Train.model_fields)
    assert "train.steps=null" in help_text(KNOWN) and "train.compile=false" in help_text(KNOWN)
