"""Reads settings from config files (YAML) and `section.key=value` arguments; unknown keys are errors.

Every command starts with this. Every package describes its own section as a pydantic model; `read` merges the file and
the arguments and validates them. All values arrive as text and are converted to the type of their key, so `6e-4` is a
number and a run may be named `007`. A user error raises a ConfigError: one line with the key, the value and the fix.
Nothing here imports torch.
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
    """A problem that the user can fix: a wrong setting, a damaged file, a full disk, a hub that does not answer.

    The command prints the message, which is one line that names the value and the fix, without a traceback, and exits
    with code 2.
    """


class ConfigError(UserError):
    """An invalid setting: names the key, the value and the fix."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


class Section(BaseModel):
    """A section of the settings: unknown keys are errors, and values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class _TextLoader(yaml.BaseLoader):
    """Loads YAML with all scalars as text, except null."""


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_TextLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def load_file(path: str | Path) -> dict[str, dict[str, Any]]:
    """The sections of a YAML file, with values as text.

    Raises ConfigError if the file is missing, cannot be read, is not YAML, or is not a map of known sections.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _TextLoader)
    except FileNotFoundError:
        neighbors = sorted(p.name for p in path.parent.glob("*.yaml"))
        hint = f"that folder holds {', '.join(neighbors)}" if neighbors else "see launch/ for examples"
        raise ConfigError(f"{path}: no such config file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if getattr(error, "problem_mark", None) else 1  # type: ignore[attr-defined]
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}, line {line}: not valid YAML: {problem}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: should be a map of sections ({', '.join(SECTIONS)})")
    sections = {}
    for name, keys in content.items():
        if name not in SECTIONS:
            raise ConfigError(f"{path}: {_unknown_key(str(name), str(name), SECTIONS)}")
        if keys is not None and not isinstance(keys, dict):
            raise ConfigError(f"{path}: {name}: should be a map of keys and values")
        sections[name] = {str(key): value for key, value in (keys or {}).items()}
    return sections


def parse_argument(argument: str) -> tuple[list[str], Any]:
    """`section.key=value` -> (path of the key, value). Raises ConfigError for any other argument."""
    key, equals, text = argument.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise ConfigError(f"{argument}: not a setting; write section.key=value, such as train.steps=100")
    if path[0] not in SECTIONS:
        raise ConfigError(_unknown_key(key, path[0], SECTIONS))
    if text.startswith(("[", "{")):
        try:
            return path, yaml.load(text, _TextLoader)
        except yaml.YAMLError:
            raise ConfigError(f"{argument}: the value is not valid YAML") from None
    return path, None if text in ("", "~", "null") else text


def read(
    sections: Mapping[str, type[BaseModel]], path: str | Path | None, arguments: Sequence[str] = ()
) -> dict[str, Any]:
    """The settings of the file, overridden by the arguments, as validated instances of `sections`.

    Sections that are not in `sections` belong to other packages and are ignored. Keys that a section names in
    `mutually_exclusive` exclude one another: one that is given later removes those that were given before.
    Raises ConfigError.
    """
    raw = load_file(path) if path else {}
    for argument in arguments:
        keys, value = parse_argument(argument)
        values = raw.setdefault(keys[0], {})
        exclusive = getattr(sections.get(keys[0]), "mutually_exclusive", ())
        if keys[1] in exclusive:
            for key in exclusive:
                values.pop(key, None)
        for key in keys[1:-1]:
            if not isinstance(values.get(key), dict):
                values[key] = {}
            values = values[key]
        values[keys[-1]] = value
    return {name: check(section, name, raw.get(name, {})) for name, section in sections.items()}


def check(section: type[BaseModel], name: str, values: Mapping[str, Any]) -> Any:
    """A `section` with these values. Raises ConfigError with one line about the first key that is wrong."""
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_one_line(section, name, values, error)) from None


def _one_line(section: type[BaseModel], name: str, values: Mapping[str, Any], error: ValidationError) -> str:
    """The first problem of a ValidationError in one line: key, value and fix."""
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known: Mapping[str, Any] = section.model_fields
        for key in keys[:-1]:
            nested = [a for a in typing.get_args(known[key].annotation) if hasattr(a, "model_fields")]
            known = nested[0].model_fields if nested else {}
        prefix = ".".join([name, *keys[:-1]]) + "."
        return _unknown_key(prefix + keys[-1], keys[-1], list(known), prefix)
    if not keys:  # a validator of the whole section, which names the keys itself
        return f"{name}.{_simplify(first['msg'])}"
    field = keys[0]
    problems = [_simplify(e["msg"]) for e in error.errors() if str(e["loc"][0]) == field]
    value = "null" if values.get(field) is None else values[field]
    return f"{name}.{field}={value}: {' or '.join(dict.fromkeys(problems))}"


def _simplify(message: str) -> str:
    """A message of pydantic in simpler words."""
    message = message.removeprefix("Value error, ").replace("Input should be ", "should be ")
    message = re.sub(r"a valid (integer|number|boolean).*", r"a \1", message)
    return message.replace("a integer", "an integer").replace("a boolean", "true or false")


def _unknown_key(full_key: str, key: str, known: Sequence[str], prefix: str = "") -> str:
    """The message about an unknown key. It suggests the most similar known key (after `prefix`), or lists all."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if nearest:
        return f"{full_key}: unknown key; did you mean {prefix}{nearest[0]}?"
    return f"{full_key}: unknown key; known: {', '.join(known)}"


def dump(sections: Mapping[str, BaseModel]) -> str:
    """The settings as YAML, from which `read` restores the same settings."""
    content = {name: section.model_dump() for name, section in sections.items()}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def key_table(sections: Mapping[str, type[BaseModel]]) -> list[tuple[str, str, str]]:
    """(key, default, description) of every key, for `--help` and docs/settings.md."""
    rows = []
    for name, section in sections.items():
        for key, field in section.model_fields.items():
            default = field.get_default(call_default_factory=True)
            rows.append((f"{name}.{key}", _as_typed(default), field.description or ""))
    return rows


def _as_typed(value: Any) -> str:
    """A value as a user writes it in an argument."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def help_text(sections: Mapping[str, type[BaseModel]]) -> str:
    """`key_table` in columns for a terminal."""
    rows = [(f"{key}={default}", description) for key, default, description in key_table(sections)]
    width = min(44, max(len(left) for left, _ in rows))
    return "\n".join(f"  {left:<{width}}  {description}" for left, description in rows)
