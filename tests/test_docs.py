"""Documentation names only what exists: paths, modules, commands, options, targets, settings, keys, links.

Read are the Markdown pages, and the docstrings and comments of the code. Decision records and superseded measurements
(`docs/adr`, `docs/results/notebook`) speak of their own day and may name what is gone; their links must resolve.

A path may hold placeholders (`configs/tasks/<name>.yaml`, `…`, NAME) or be a pattern; then something must match it.
Paths inside a run directory begin with no folder of the repository and are not looked for.
"""

import ast
import importlib
import io
import itertools
import re
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from components.config import RunConfig
from components.flow import STAGES
from components.settings import Settings
from tests.worlds import REPOSITORY

PATTERNS = ("*.md", "docs/**/*.md", "k8s/**/*.md", "feature_repo/**/*.md", "benchmarks/*.md")
PAGES = sorted(path for pattern in PATTERNS for path in REPOSITORY.glob(pattern))
OF_THEIR_DAY = ("docs/adr", "docs/results/notebook")
CODE = ("components", "dags", "benchmarks", "feature_repo", "tests")
COMMENTED = ("k8s/**/*.y*ml", "k8s/**/Dockerfile", "configs/**/*.yaml", "Makefile", "pyproject.toml", ".airflowignore")
FOLDERS = ("components", "dags", "benchmarks", "feature_repo", "configs", "docs", "k8s", "tests", ".ci")

_PLACEHOLDER = re.compile(r"<[^<>]+>|\{[^{}]+\}|…|\b[A-Z][A-Z_]+\b(?!\.)")
_SPAN = re.compile(r"`([^`]+)`")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_DOTTED = re.compile(rf"(?<![\w./-])(?:{'|'.join(CODE[:3])})(?:\.\w+)+(?![\w/])")
_OPTION = re.compile(r"(?<![^\s\"'\[(=,/])(--?[a-zA-Z][\w-]*)")


def find_faults(text: str, folder: Path = REPOSITORY) -> list[str]:
    """What a text names that does not exist, one sentence each.

    Args:
        text: Markdown, a docstring or a comment.
        folder: Of the page; paths may be relative to it.
    """
    variables = sorted(set(re.findall(r"\bURM_[A-Z][A-Z_]*", text)))
    return [
        *(f"no path {path}" for path in _find_paths(text, folder)),
        *(f"no setting {name}" for name in variables if not _is_setting(name)),
        *(f"no module or name {name}" for name in _DOTTED.findall(text) if not _is_importable(name)),
        *(fault for command in _find_commands(text) for fault in _judge_command(command)),
    ]


def _find_paths(text: str, folder: Path) -> Iterator[str]:
    """Paths without a file or folder."""
    beside = (child.name for child in folder.iterdir() if child.is_dir()) if folder != REPOSITORY else ()
    names = "|".join(re.escape(name) for name in {*FOLDERS, *beside})
    for match in re.finditer(rf"(?<![\w./:<>@*-])((?:{names})/(?:[\w./*…-]|<[^<>]+>|{{[^{{}}]+}})*)", text):
        path = match[1].rstrip(".-")
        if not any(_exists(root, path) for root in (REPOSITORY, folder)):
            yield path
    for name in re.findall(r"(?<![\w./*<>-])([a-z_]\w*\.py)\b", text):
        if name not in _file_names():
            yield name


def _exists(root: Path, path: str) -> bool:
    pattern = _PLACEHOLDER.sub("*", path)
    return any(root.glob(pattern.rstrip("/"))) if "*" in pattern else (root / path).exists()


@cache
def _file_names() -> frozenset[str]:
    return frozenset(path.name for folder in CODE for path in (REPOSITORY / folder).rglob("*.py"))


@cache
def _settings() -> frozenset[str]:
    """Environment variables: of the settings, and those that only the fault tests read; and constants of that name."""
    own = (("tests/faults", r"\"(URM_FAULT_[A-Z_]+)\""), ("components", r"(?m)^(URM_[A-Z_]+) ="))
    paths = [(path, pattern) for folder, pattern in own for path in (REPOSITORY / folder).rglob("*.py")]
    names = {f"URM_{name.upper()}" for name in Settings.model_fields}
    return frozenset(names.union(*(re.findall(pattern, path.read_text()) for path, pattern in paths)))


def _is_setting(name: str) -> bool:
    return any(known.startswith(name) for known in _settings()) if name.endswith("_") else name in _settings()


def _is_key(parts: list[str], annotation: Any = RunConfig) -> bool:
    """Whether a key of the configuration exists; what lies in a mapping is free."""
    if not parts or getattr(annotation, "__origin__", None) is dict:
        return True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(parts[0])
        return field is not None and _is_key(parts[1:], field.annotation)
    return any(_is_key(parts, argument) for argument in get_args(annotation))


def _is_importable(name: str) -> bool:
    """Whether a dotted name is a module, or a name at the top level of one (or an attribute of that)."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = REPOSITORY.joinpath(*parts[:length])
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if source.exists():
            return length == len(parts) or parts[length] in _top_level(source)
    return False


@cache
def _top_level(source: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.parse(source.read_text()).body:
        names |= {alias.asname or alias.name for alias in getattr(node, "names", ())}
        names |= {getattr(node, "name", "")}
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


def _find_commands(text: str) -> Iterator[str]:
    """Code of a text, one command each: inline code, and lines of code blocks."""
    blocks = [line for fence in _FENCE.findall(text) for line in fence.replace("\\\n", " ").splitlines()[1:-1]]
    rest = _FENCE.sub("", text)
    blocks += [line for line in rest.splitlines() if re.match(r" {4,}(?:\w+=\S+ )*(?:urm|make|python|torchrun) ", line)]
    for span in _SPAN.findall(rest):
        if "\n\n" not in span:
            yield " ".join(span.split())
    for line in blocks:
        yield from (part.strip() for part in re.split(r"#|;|&&|\|", line.removeprefix("$ ")))


def _judge_command(command: str) -> Iterator[str]:
    """Faults of one piece of code."""
    key = re.match(r"([a-z_]+(?:\.[a-z_]+)+)(?:$|[=: ])", command)
    if key and command.split(".")[0] in RunConfig.model_fields and not _is_key(key[1].split(".")):
        if not key[1].endswith((".json", ".safetensors", ".yaml")):
            yield f"no key {key[1]} of a configuration"
    if target := re.match(r"make ([a-z][\w-]*)", command):
        if not re.search(rf"^{target[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE):
            yield f"no target make {target[1]}"
    module = re.search(r"(?:^|\s)-m ((?:components|benchmarks|dags|tests)[\w.]*)(.*)", command)
    urm = re.search(r"(?:^|[\s\"'])urm(\s.*|$)", command)
    if module and module[1] != "components":
        yield from _judge_module(module[1], module[2])
    elif module or (urm and not re.match(r"(docker|kubectl|pip|git|redis-cli)\b", command)):
        yield from _judge_urm(module[2] if module else urm[1] if urm else "")
    elif command.startswith(("--", "make ")):
        yield from (f"no option {option}" for option in _find_options(command) - _all_options())


def _judge_module(name: str, arguments: str) -> Iterator[str]:
    path = REPOSITORY.joinpath(*name.split("."))
    main = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if not main.exists() or "__main__" not in f"{main.name} {main.read_text()}":
        yield f"no program python -m {name}"
        return
    known = _options_of_module(path if path.is_dir() else main)
    yield from (f"python -m {name} has no option {option}" for option in _find_options(arguments) - known)


def _judge_urm(arguments: str) -> Iterator[str]:
    """Walk the tree of commands as far as the words go, then look for the options."""
    place, walked = _command(), "urm"
    words = arguments.split()
    while hasattr(place, "commands") and words and not words[0].startswith("-"):
        word = words.pop(0)
        if word == "<stage>":
            yield from (f"not every stage has {option}" for option in _find_options(arguments) - _options_of_stages())
            return
        if _PLACEHOLDER.match(word):
            break
        if word not in place.commands:
            yield f"no command {walked} {word}"
            return
        place, walked = place.commands[word], f"{walked} {word}"
    known = set().union(*(_options_of_command(command) for command in _leaves(place)))
    yield from (f"{walked} has no option {option}" for option in _find_options(" ".join(words)) - known)


def _find_options(arguments: str) -> set[str]:
    return set(_OPTION.findall(re.sub(r"\"[^\"-][^\"]*\"", "", arguments))) - {"--help"}


@cache
def _command() -> Any:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    return typer.main.get_command(importlib.import_module(scripts["urm"].split(":")[0]).app)


def _leaves(command: Any) -> Iterator[Any]:
    yield command
    for child in getattr(command, "commands", {}).values():
        yield from _leaves(child)


def _options_of_command(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def _options_of_stages() -> set[str]:
    return set.intersection(*(_options_of_command(_command().commands[stage]) for stage in STAGES))


@cache
def _options_of_module(path: Path) -> frozenset[str]:
    """Options that a program of `benchmarks` adds, itself or by its neighbours that it imports."""
    sources = "".join(file.read_text() for file in (path.glob("*.py") if path.is_dir() else [path]))
    for neighbour in set(re.findall(r"from benchmarks\.(\w+) import|from benchmarks import (\w+)", sources)):
        file = (REPOSITORY / "benchmarks" / "".join(neighbour)).with_suffix(".py")
        sources += file.read_text() if file.exists() else ""
    return frozenset(re.findall(r"\"(--?[a-z][\w-]*)\"", sources))


@cache
def _all_options() -> frozenset[str]:
    options = set().union(*(_options_of_command(command) for command in _leaves(_command())))
    return frozenset(options).union(*(_options_of_module(path) for path in (REPOSITORY / "benchmarks").rglob("*.py")))


def find_dead_links(text: str, page: Path) -> list[str]:
    """Relative links of a page that lead to no file or no heading."""

    def resolves(target: str) -> bool:
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        return file.exists() and (not anchor or anchor in _anchors(file.read_text() if path else text))

    targets = (target for target in _LINK.findall(_FENCE.sub("", text)) if not re.match(r"[a-z]+:", target))
    return [target for target in targets if not resolves(target)]


def _anchors(text: str) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", _FENCE.sub("", text), re.MULTILINE):
        plain = _LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading)
        base = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(1)))
        anchors.add(next(name for name in names if name not in anchors))
    return anchors


def _read_prose(source: Path) -> Iterator[str]:
    """Docstrings and blocks of comments of a module."""
    text = source.read_text()
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    yield from (ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    yield "\n".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def _faults_of(files: Iterable[Path], read: Any) -> list[str]:
    return [f"{_name(file)}: {fault}" for file in sorted(files) for text in read(file) for fault in find_faults(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if not _name(page).startswith(OF_THEIR_DAY)], ids=_name)
def test_page_names_what_exists(page: Path) -> None:
    assert find_faults(page.read_text(), page.parent) == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_of_a_page_resolve(page: Path) -> None:
    assert find_dead_links(page.read_text(), page) == []


@pytest.mark.parametrize("folder", CODE)
def test_docstrings_and_comments_name_what_exists(folder: str) -> None:
    assert _faults_of((REPOSITORY / folder).rglob("*.py"), _read_prose) == []


@pytest.mark.parametrize("pattern", COMMENTED)
def test_comments_of_other_files_name_what_exists(pattern: str) -> None:
    def read(file: Path) -> list[str]:
        return ["\n".join(re.findall(r"(?:^|\s)#\s(.*)$", file.read_text(), re.MULTILINE))]

    files = list(REPOSITORY.glob(pattern))
    assert files
    assert _faults_of(files, read) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("see components/nowhere.py for it", "no path components/nowhere.py"),
        ("one per file in `docs/gone/`", "no path docs/gone/"),
        ("`configs/tasks/<name>.toml`", "no path configs/tasks/<name>.toml"),
        ("what `no_such_module.py` does", "no path no_such_module.py"),
        ("`urm fly`", "no command urm fly"),
        ("`urm recall\nfly`", "no command urm recall fly"),
        ("`urm sft --seed 1`", "urm sft has no option --seed"),
        ("`urm <stage> --promote-anyway`", "not every stage has --promote-anyway"),
        ("```sh\nX=1 urm recall serve --prot 1  # urm dance\n```", "urm recall serve has no option --prot"),
        ("```sh\nurm up  # urm dance\n```", "no command urm dance"),
        ("    urm status --colour", "urm status has no option --colour"),
        ("`torchrun -m components sft --seed 1`", "urm sft has no option --seed"),
        ("with `--no-such-option` set", "no option --no-such-option"),
        ("`make coffee`", "no target make coffee"),
        ('`make results ARGS="--nothing"`', "no option --nothing"),
        ("`python -m benchmarks.nothing`", "no program python -m benchmarks.nothing"),
        ("`python -m benchmarks.index --nothing`", "python -m benchmarks.index has no option --nothing"),
        ("set URM_NOTHING", "no setting URM_NOTHING"),
        ("the URM_NOTHING_* variables", "no setting URM_NOTHING_"),
        ("`recall.nothing`", "no key recall.nothing of a configuration"),
        ("`urm.max_step=50`", "no key urm.max_step of a configuration"),
        ("by `components.nothing.run`", "no module or name components.nothing.run"),
        ("by components.settings.Setting", "no module or name components.settings.Setting"),
    ],
)
def test_planted_fault_is_found(text: str, fault: str) -> None:
    assert fault in find_faults(text)


@pytest.mark.parametrize(
    "text",
    [
        "components/settings.py, `configs/tasks/`, `configs/tasks/*.yaml` and `configs/ablations/<grid>.yaml`",
        "`<run>/sft/model/`, `sft/result.json`, s3://docs/none, `urm:latest`, `urm.json` and `s3://x/configs/none`",
        "`urm sft --config NAME -r DIR --set seed=0`, `urm <stage> --force` and `urm recall …`",
        "`docker build -t urm:1 --build-arg X=1 .` and `redis-cli --latency`",
        '`make demo`; sure, make sense of it; `make results ARGS="--list"`',
        "URM_HOME, URM_AIRFLOW_* and URM_FAULT_SEED; `recall.filters`, `features.split.recent_cuts: 1`",
        "`components.settings.Settings.run_dir` and components.evaluation",
    ],
)
def test_what_exists_is_no_fault(text: str) -> None:
    assert find_faults(text) == []


def test_dead_links_are_found() -> None:
    page = REPOSITORY / "docs" / "guarantees.md"
    headings, good = ("## A: b, `c`\n## A: b, `c`\n", "[x](#a-b-c) [x](#a-b-c-1) [x](runbook.md#replay)")
    text = f"{headings}{good} [x](#a-b) [x](none.md) [x](runbook.md#none)"
    assert find_dead_links(text, page) == ["#a-b", "none.md", "runbook.md#none"]
