"""What pages point at is there: links, files, names in code, commands, make targets."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import click
import pytest

from deployments.cli.main import cli
from governance import errors
from governance.errors import GatehouseError
from tests.docs import pages
from tests.docs.pages import PAGES, ROOT

TOP = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
NOT_IN_THE_TREE = ("data/", "build/")
"""Made by running."""
FOREIGN = {"api.requestedAccessTokenVersion", "RAY_SERVE_DEFAULT_HTTP_HOST"}
"""Names of other products: a key of Entra's application manifest, a variable of Ray's."""

every_page = pytest.mark.parametrize("page", PAGES, ids=pages.name)


@every_page
def test_links_resolve(page: Path) -> None:
    missing = []
    for link in pages.links(page):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(link)
    assert not missing


def anchors(page: Path) -> set[str]:
    """Anchors of headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    named = [
        span
        for span in pages.spans(page)
        if re.fullmatch(r"[\w.-]+(/[\w.*-]+)*/?", span)
        and ("/" in span or span.endswith((".py", ".yaml", ".toml")))
        and not span.startswith(NOT_IN_THE_TREE)
        and (span.split("/")[0] in TOP or span.endswith((".py", ".yaml", ".toml")))
    ]
    here = page.parent
    assert not [path for path in named if not [*ROOT.glob(path), *here.glob(path)]]


def test_symbols_of_modules_exist() -> None:
    """Wherever a module's path is followed by names in backticks, the module defines them."""
    pairs = []
    for page in PAGES:
        for path, names in re.findall(
            r"`([\w/]+\.py)`((?:,? `\w+(?:\.\w+)?`)+)", pages.prose(page)
        ):
            pairs += [(path, symbol) for symbol in re.findall(r"`([\w.]+)`", names)]
    assert len(pairs) > 3
    assert not [(path, symbol) for path, symbol in pairs if symbol not in symbols(path)]


@functools.cache
def symbols(path: str) -> frozenset[str]:
    """Names at the top of a module, and one level into its classes."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        for name in _names(node):
            found.add(name)
            if isinstance(node, ast.ClassDef):
                found.update(f"{name}.{inner}" for part in node.body for inner in _names(part))
    return frozenset(found)


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


@every_page
def test_names_in_code_occur_in_the_code(page: Path) -> None:
    """A class, function, constant, key or variable that is gone must not live on in a page."""
    named = {span for span in pages.spans(page) if re.fullmatch(r"[A-Za-z_]\w+(\.\w+)*", span)}
    known = words()
    assert not sorted(n for n in named - FOREIGN if not set(n.split(".")) <= known)


@functools.cache
def words() -> frozenset[str]:
    """Every word of code and configuration, and the names of files."""
    folders = ("deployments", "governance", "routing", "benchmarks", "scripts", "config")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [*ROOT.glob("*.yaml"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    found: set[str] = set()
    for path in files:
        if path.suffix in {".py", ".yaml", ".toml", ".json", ".c", ".sql", ""}:
            found.update(re.findall(r"\w+", path.read_text()))
            found.update(path.name.split("."))
    return frozenset(found)


@every_page
def test_commands_exist(page: Path) -> None:
    wrong = [command for command in gatehouse_commands(page) if not is_command(command)]
    assert not wrong


def gatehouse_commands(page: Path) -> list[str]:
    """Uses of the command line, in blocks and in text."""
    texts = [line for block in pages.blocks(page) for line in block.commands()]
    return [
        use
        for text in (*texts, *pages.spans(page))
        for use in re.findall(r"gatehouse [a-z][^|)#]*", text)
    ]


def is_command(use: str) -> bool:
    """Whether a use names a command and only options that it has."""
    command: click.Command = cli
    rest = use.split()[1:]
    while isinstance(command, click.Group):
        # `key create | rotate`: the page names several of a group.
        if not rest or rest[0] not in command.list_commands(click.Context(command)):
            return not rest
        found = command.get_command(click.Context(command), rest.pop(0))
        assert found is not None
        command = found
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    return all(word.split("=")[0] in known for word in rest if word.startswith("--"))


@every_page
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    texts = [line for block in pages.blocks(page) for line in block.commands()]
    targets = {
        target
        for text in (*texts, *pages.spans(page))
        for target in re.findall(r"(?:^|\s)make ([a-z][\w-]*)", text)
    }
    assert not [t for t in targets if not re.search(rf"^{t.split('-')[0]}[\w%-]*:", makefile, re.M)]


def test_the_page_for_a_bad_night_names_every_5xx() -> None:
    page = (ROOT / "docs/guides/operate.md").read_text()
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {
        cls.code
        for cls in classes
        if issubclass(cls, GatehouseError) and cls is not GatehouseError and cls.status >= 500
    }
    assert len(codes) > 5
    assert not [code for code in codes if f"`{code}`" not in page]
