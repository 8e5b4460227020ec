"""Reading of configuration files.

Every error names the file, the field and the value.
"""

import difflib
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from components.config.model import Model
from components.config.run import RunConfig
from components.config.sources import SOURCE_KINDS
from components.exceptions import ConfigError
from components.yaml_text import parse

Document = TypeVar("Document", bound=Model)


def load_named_config(name: str, configs_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration as the command line names it: a YAML file, or the name of one in `configs_dir`.

    Overrides are KEY=VALUE each, the value in YAML.

    Raises:
        ConfigError: As `load_config`, or an override is no KEY=VALUE.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = configs_dir / f"{name}.yaml"
    values: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(
                f"option --set {override!r}", expected="KEY=VALUE", got="no '='", remedy="write e.g. urm.max_steps=50"
            )
        values[key] = _parse_value(override, text)
    return load_config(path, values)


def _parse_value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"option --set {override!r}", expected="a value in YAML", got=error, remedy="quote the value"
        ) from None


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a run configuration and the tasks it names, which lie in the folder `tasks` beside it.

    Overrides are values by dotted key, e.g. {"urm.max_steps": 50}.

    Raises:
        ConfigError: A file is missing or unreadable, or a field is unknown, missing or out of range.
    """
    path = Path(path)
    content = _read_yaml(path)
    for key, value in (overrides or {}).items():
        _set(content, key, value)
    names = content.get("tasks", [])
    files: dict[int, Path] = {}
    if isinstance(names, list):
        files = {
            index: path.parent / "tasks" / f"{name}.yaml" for index, name in enumerate(names) if isinstance(name, str)
        }
        content["tasks"] = [
            _read_yaml(files[index]) if index in files else written for index, written in enumerate(names)
        ]
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise _explain(path, files, error) from None


def load_document(path: Path, kind: type[Document]) -> Document:
    """Read a YAML file of a kind that stands beside the configurations.

    Raises:
        ConfigError: The file is missing or unreadable, or a field is unknown, missing or out of range.
    """
    try:
        return kind.model_validate(_read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"file {path}, field {field!r}",
            expected="a known key" if first["type"] == "extra_forbidden" else _expectation(first["type"], first["msg"]),
            got="nothing" if first["type"] == "missing" else reprlib.repr(first["input"]),
            remedy="fix the file",
        ) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"configuration {path}", expected="a readable YAML file", got=error.strerror, remedy="check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"configuration {path}", expected="UTF-8 text", got=error, remedy="save the file as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"configuration {path}", expected="valid YAML", got=error, remedy="fix the file at the line named"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"configuration {path}",
            expected="a mapping of keys",
            got=type(content).__name__,
            remedy="start from configs/complete_journey.yaml",
        )
    return content


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise ConfigError(
                f"override {key!r}",
                expected="a path through sections",
                got=f"the plain value {parent!r} on the way",
                remedy="name an existing field, e.g. urm.max_steps",
            )
    content[leaf] = value


def _explain(path: Path, task_files: dict[int, Path], error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    location = first["loc"]
    if len(location) > 1 and location[0] == "tasks" and location[1] in task_files:
        path, location = task_files[int(location[1])], location[2:]
    if location[:1] == ("source",):
        location = ("source", *location[2:])  # the second part is the kind, which is no key
    field = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        known = _known_fields(first["loc"])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        return ConfigError(
            f"configuration {path}, key {field!r}",
            expected=f"one of {', '.join(known)}" if known else "a known key",
            got="an unknown key",
            remedy=f"did you mean {close[0]!r}" if close else "remove it",
        )
    if first["type"].startswith("union_tag"):
        return ConfigError(
            f"configuration {path}, field '{field}.kind'",
            expected=" or ".join(SOURCE_KINDS),
            got=repr(first["ctx"]["tag"]) if "tag" in first["ctx"] else "nothing",
            remedy="set a valid value",
        )
    return ConfigError(
        f"configuration {path}, field {field!r}",
        expected=_expectation(first["type"], first["msg"]),
        got="nothing" if first["type"] == "missing" else reprlib.repr(first["input"]),
        remedy="set a valid value",
    )


def _expectation(kind: str, message: str) -> str:
    """Pydantic's message in the form that follows "expected"."""
    if kind == "missing":
        return "a value"
    message = message.removeprefix("Value error, ").removeprefix("expected ").removeprefix("Input should be ")
    return re.sub(r"^(Input|String|Value|List|Tuple|Dictionary|Set) should ", "a value that should ", message)


def _known_fields(location: tuple[int | str, ...]) -> list[str]:
    schema: dict[str, Any] = RunConfig.model_json_schema()
    node = schema
    for part in location[:-1]:
        if "discriminator" in node:
            node = {"$ref": node["discriminator"]["mapping"][part]}
        else:
            node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return sorted(node.get("properties", {}))
