"""Settings: the strict reader of YAML files and `section.key=value` words.

Every package describes its own section as a pydantic model; `read` puts file and words together and checks them.
All values arrive as text and take the type of their key, so `6e-4` is a number and a run may be named `007`.
What a user got wrong is a ConfigError: one line with the key, the value and the fix. Nothing here imports torch.
"""

import argparse
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

SECTIONS = ("data", "model", "train", "parallel", "checkpoint", "eval", "sample", "log", "run")


class UserError(Exception):
    """A mistake of the user's: its text is the one line to print, the exit code is 2."""


class ConfigError(UserError):
    """A setting that cannot be: names the key, the value and the fix."""


class Parser(argparse.ArgumentParser):
    """One whose complaints are the user's mistakes: raises UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class _Text(yaml.BaseLoader):
    """YAML whose scalars stay text, but for null."""


_Text.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Text.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def load_file(path: str | Path) -> dict[str, dict[str, Any]]:
    """The sections of a YAML file as text. Raises ConfigError when it is missing or is no map of known sections."""
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Text)
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.yaml"))
        hint = f"that folder holds {', '.join(beside)}" if beside else "see launch/ for examples"
        raise ConfigError(f"{path}: no such config file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if getattr(error, "problem_mark", None) else 1  # type: ignore[attr-defined]
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}, line {line}: not YAML: {problem}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a map of sections ({', '.join(SECTIONS)})")
    sections = {}
    for name, keys in content.items():
        _known(str(name), SECTIONS, str(name), f"{path}: ")
        if keys is not None and not isinstance(keys, dict):
            raise ConfigError(f"{path}: {name}: not a map of keys")
        sections[name] = {str(key): value for key, value in (keys or {}).items()}
    return sections


def parse_word(word: str) -> tuple[list[str], Any]:
    """`section.key=value` -> (path of the key, value). Raises ConfigError on any other word."""
    key, equals, text = word.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise ConfigError(f"{word}: not a setting; write section.key=value, such as train.steps=100")
    _known(path[0], SECTIONS, key)
    if text[:1] in "[{" and text:
        try:
            return path, yaml.load(text, _Text)
        except yaml.YAMLError:
            raise ConfigError(f"{word}: the value is not YAML") from None
    return path, None if text in ("", "~", "null") else text


def read(sections: Mapping[str, type[BaseModel]], path: str | Path | None, words: Sequence[str] = ()) -> dict[str, Any]:
    """File, then words over it, checked against `sections`; sections of other packages are passed over.

    Keys in the `mutually_exclusive` of a section exclude one another: the last one given wins over an earlier layer.
    Raises ConfigError.
    """
    raw = load_file(path) if path else {}
    for word in words:
        keys, value = parse_word(word)
        at = raw.setdefault(keys[0], {})
        rivals = getattr(sections.get(keys[0]), "mutually_exclusive", ())
        if keys[1] in rivals:
            for rival in rivals:
                at.pop(rival, None)
        for key in keys[1:-1]:
            if not isinstance(at.get(key), dict):
                at[key] = {}
            at = at[key]
        at[keys[-1]] = value
    return {name: check(section, name, raw.get(name, {})) for name, section in sections.items()}


def check(section: type[BaseModel], name: str, values: Mapping[str, Any]) -> Any:
    """`section` made of `values`. Raises ConfigError with one line on the first key that is wrong."""
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_one_line(section, name, values, error)) from None


def _one_line(section: type[BaseModel], name: str, values: Mapping[str, Any], error: ValidationError) -> str:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known: Mapping[str, Any] = section.model_fields
        for part in where[:-1]:
            inner = [a for a in typing.get_args(known[part].annotation) if hasattr(a, "model_fields")]
            known = inner[0].model_fields if inner else {}
        return _unknown(".".join([name, *where]), where[-1], list(known), ".".join([name, *where[:-1]]) + ".")
    if not where:  # a check over several keys, which names them itself
        return f"{name}.{_clean(first['msg'])}"
    field = where[0]
    same = [e for e in error.errors() if str(e["loc"][0]) == field]
    wants = " or ".join(dict.fromkeys(_clean(e["msg"]) for e in same))
    value = values.get(field)
    return f"{name}.{field}={'null' if value is None else value}: {wants}"


def _clean(message: str) -> str:
    message = message.removeprefix("Value error, ").replace("Input should be ", "should be ")
    message = re.sub(r"a valid (integer|number|boolean).*", r"a \1", message)
    return message.replace("a integer", "an integer").replace("a boolean", "true or false")


def _unknown(full: str, key: str, known: Sequence[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"{full}: unknown key; " + (f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}")


def _known(key: str, known: Sequence[str], full: str, where: str = "") -> None:
    if key not in known:
        raise ConfigError(where + _unknown(full, key, known, ""))


def dump(sections: Mapping[str, BaseModel]) -> str:
    """The settings as YAML that `read` takes back unchanged."""
    return yaml.safe_dump({k: v.model_dump() for k, v in sections.items()}, sort_keys=False, allow_unicode=True)


def key_table(sections: Mapping[str, type[BaseModel]]) -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every key, for `--help` and the README."""
    rows = []
    for name, section in sections.items():
        for key, field in section.model_fields.items():
            default = field.get_default(call_default_factory=True)
            shown = {None: "null", True: "true", False: "false"}.get(default, default) if _plain(default) else default
            rows.append((f"{name}.{key}", str(shown), field.description or ""))
    return rows


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def help_text(sections: Mapping[str, type[BaseModel]]) -> str:
    """`key_table` in columns for a terminal."""
    rows = [(f"{key}={default}", meaning) for key, default, meaning in key_table(sections)]
    width = min(44, max(len(left) for left, _ in rows))
    return "\n".join(f"  {left:<{width}}  {meaning}" for left, meaning in rows)
