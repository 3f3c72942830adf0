import subprocess
import sys
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
    """A section such as other packages have, with each kind of key."""

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


def train_of(*words: str, file: str = "", folder: Path | None = None) -> Train:
    path = None
    if folder:
        path = folder / "c.yaml"
        path.write_text(file, encoding="utf-8")
    return read(KNOWN, path, words)["train"]


def refusal(*words: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        read(KNOWN, path, words)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)
    return str(error.value)


def refusal_of(folder: Path, content: str | bytes) -> str:
    """What is said of a file, without the file's name before it."""
    path = folder / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return refusal(path=path).removeprefix(str(path))


def test_defaults_make_a_config():
    config = read(KNOWN, None)
    assert config == {"data": DEFAULT, "train": Train.model_validate({})}
    assert config["data"].source == "storybook" and config["data"].held_out == 0.02


@pytest.mark.parametrize("text", ["6e-4", "6E-4", "0.0006", ".0006", "+6e-4", "6.0e-4"])
def test_numbers_are_numbers_in_files_and_words(tmp_path, text):
    assert train_of(f"train.max_lr={text}").max_lr == 6e-4
    assert train_of(file=f"train:\n  max_lr: {text}\n", folder=tmp_path).max_lr == 6e-4
    assert train_of(file="train: {max_lr: 1e-8}", folder=tmp_path).max_lr == 1e-8


def test_text_stays_text(tmp_path):
    for name in ("007", "1e3", "true", "null x", "2024-01-01", "0x10", "yes", "1_000"):
        assert train_of(f"train.name={name}").name == name
        assert train_of(file=f"train:\n  name: {name}\n", folder=tmp_path).name == name
    assert train_of("train.name=a=b").name == "a=b"
    assert read(KNOWN, None, ["data.validation=0.1"])["data"].validation == "0.1"


def test_truth_and_nothing(tmp_path):
    for text, value in [("true", True), ("false", False), ("True", True), ("1", True), ("0", False), ("no", False)]:
        assert train_of(f"train.compile={text}").compile is value
        assert train_of(file=f"train: {{compile: {text}}}", folder=tmp_path).compile is value
    for text in ("null", "~", ""):
        assert train_of("train.steps=5", f"train.steps={text}").steps is None
        assert train_of(file=f"train:\n  steps: {text}\n", folder=tmp_path).steps is None


def test_lists(tmp_path):
    assert train_of("train.prompts=[Once upon, 7]").prompts == ("Once upon", "7")
    assert train_of("train.prompts=[]").prompts == ()
    assert train_of(file="train:\n  prompts: [a, 6e-4]\n", folder=tmp_path).prompts == ("a", "6e-4")


def test_the_last_of_a_key_wins(tmp_path):
    assert train_of("train.name=a", "train.name=b").name == "b"
    assert train_of(file="train: {name: a, name: b}", folder=tmp_path).name == "b"
    assert train_of("train.name=c", file="train: {name: a}", folder=tmp_path).name == "c"


def test_alternatives_replace_each_other(tmp_path):
    file = "train: {epochs: 2}"
    words = ["train.steps=7"]
    config = train_of(*words, file=file, folder=tmp_path)
    assert (config.steps, config.epochs) == (7, None)
    config = train_of(*words, "train.epochs=3", file=file, folder=tmp_path)
    assert (config.steps, config.epochs) == (None, 3)
    config = train_of("train.epochs=0.5", file="train: {steps: 9}", folder=tmp_path)
    assert (config.steps, config.epochs) == (None, 0.5)
    assert refusal_of(tmp_path, "train: {steps: 9, epochs: 2}") == "train.steps and train.epochs: give one of them"


def test_sections_of_others_are_passed_over(tmp_path):
    words = ["model.dim=64", "run.name=x", "train.nonsense=1"]
    (tmp_path / "c.yaml").write_text("model: {what: ever}\nlog: {every: 1}\ndata: {vocab_size: 300}\n")
    assert read({"data": DataConfig}, tmp_path / "c.yaml", words)["data"].vocab_size == 300


def test_empty_files_and_sections_are_fine(tmp_path):
    for content in ("", "\n", "# nothing\n", "train:\n", "train: {}\n", "---\n", "\ufefftrain: {}\n"):
        assert train_of(file=content, folder=tmp_path) == Train.model_validate({})


@pytest.mark.parametrize(
    "word, said",
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
        ("data.validation=1.5", "data.validation=1.5: a fraction lies between 0 and 1; or give a path"),
        ("data.validation=0", "data.validation=0: a fraction lies between 0 and 1"),
        ("data.validation=nan", "data.validation=nan: a fraction lies between 0 and 1"),
        ("data.validation=held.txt", "data.validation=held.txt: the storybook holds out a fraction"),
        ("train.max_lr=fast", "train.max_lr=fast: should be a number"),
        ("train.max_lr=0", "train.max_lr=0: should be greater than 0"),
        ("train.max_lr=nan", "train.max_lr=nan: should be"),
        ("train.schedule=step", "train.schedule=step: "),
        ("train.replicate=[1]", "train.replicate=['1']: should be an integer or should be a"),
        ("train.prompts=one", "train.prompts=one: should be a"),
        ("train.prompts=[one", "train.prompts=[one: the value is not YAML"),
        ("seq_len=9", "seq_len=9: not a setting; write section.key=value, such as train.steps=100"),
        ("data.seq_len", "data.seq_len: not a setting; write section.key=value"),
        ("--dim=9", "--dim=9: not a setting"),
        (".=9", ".=9: not a setting"),
        ("data.=9", "data.=9: not a setting"),
        ("", ": not a setting"),
    ],
)
def test_a_bad_word_is_one_line_with_key_value_and_mend(word, said):
    assert refusal(word).startswith(said)


@pytest.mark.parametrize(
    "content, said",
    [
        ("data: {vocab_sise: 9}", "data.vocab_sise: unknown key; did you mean data.vocab_size?"),
        ("dta: {seq_len: 9}", ": dta: unknown key; did you mean data?"),
        ("data: {seq_len: many}", "data.seq_len=many: should be an integer"),
        ("data: {seq_len: {a: 1}}", "data.seq_len={'a': '1'}: should be an integer"),
        ("data: 7", ": data: not a map of keys"),
        ("data: [a]", ": data: not a map of keys"),
        ("- data", f": not a map of sections ({', '.join(SECTIONS)})"),
        ("words", ": not a map of sections"),
        ("data: {seq_len: 9", ", line 1: not YAML: "),
        ("data:\n  seq_len: 9\n bad", ", line 3: not YAML: "),
        ("data:\n\tseq_len: 9", ", line 2: not YAML: "),
        ("data: {seq_len: *x}", ", line 1: not YAML: "),
        ("a: 1\n---\nb: 2", ", line 2: not YAML: "),
        ("7: {a: b}", ": 7: unknown key; known: "),
        ("? [data]\n: 1", ", line 1: not YAML: "),
        (b"data: {dir: caf\xe9}", ": cannot be read ("),
        ("data: {dir: \0}", ", line 1: not YAML: "),
        ("data: {1: 2}", "data.1: unknown key; known: source"),
        ("data: {~: 2}", "data.None: unknown key; known: source"),
        ("~: {a: 2}", ": None: unknown key; known: "),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, content, said):
    assert refusal_of(tmp_path, content).startswith(said)


def test_a_missing_file_names_those_beside_it(tmp_path):
    assert refusal(path=tmp_path / "tiny.yaml").endswith("tiny.yaml: no such config file; see launch/ for examples")
    (tmp_path / "scout.yaml").touch()
    assert refusal(path=tmp_path / "tiny.yaml").endswith("no such config file; that folder holds scout.yaml")
    assert refusal(path=tmp_path).startswith(f"{tmp_path}: cannot be read (")


def test_a_word_beside_a_broken_section_of_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {seq_len: 8}\n")
    assert read(KNOWN, tmp_path / "c.yaml", ["data.seq_len=9"])["data"].seq_len == 9


def test_yaml_runs_no_code(tmp_path):
    tag = f"!!python/object/apply:os.system ['touch {tmp_path}/hacked']"
    refusal_of(tmp_path, f"data: {tag}")
    refusal_of(tmp_path, f"data: {{seq_len: {tag}}}")
    assert not (tmp_path / "hacked").exists()


def test_a_config_does_not_change():
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
def test_what_is_dumped_is_read_back(tmp_path_factory, **values):
    config = {"data": DataConfig.model_validate({"validation": "0.25"}), "train": Train.model_validate(values)}
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    again = read(KNOWN, path)
    assert again["data"] == config["data"]
    expected = config["train"].model_dump()
    assert {k: str(v) if k == "replicate" else v for k, v in again["train"].model_dump().items()} == expected | {
        "replicate": str(expected["replicate"])
    }
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == {"data", "train"}


def test_every_key_has_a_meaning_and_a_default_that_can_be_typed():
    table = key_table({"data": DataConfig})
    assert [key for key, _, _ in table] == [f"data.{name}" for name in DataConfig.model_fields]
    assert all(meaning for _, _, meaning in table)
    assert read(KNOWN, None, [f"{key}={default}" for key, default, _ in table])["data"] == DEFAULT
    shown = help_text(KNOWN).splitlines()
    assert len(shown) == len(DataConfig.model_fields) + len(Train.model_fields)
    assert "train.steps=null" in help_text(KNOWN) and "train.compile=false" in help_text(KNOWN)


def test_reading_settings_needs_no_torch():
    code = "import sys, data.config, data.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
