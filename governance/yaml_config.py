"""Strict YAML into frozen pydantic models, with errors that say where and why.

A configuration file is refused, never guessed at: a key given twice, an unknown key, a value of
the wrong type. The error names file, line, place and reason. It never repeats the value, because a
wrong value in a configuration file is sometimes a secret in the wrong place.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)
Place = tuple[str | int, ...]
"""Way to a value: keys and list positions from the top of the file."""

MAX_CONFIG_BYTES = 4 << 20
"""Largest configuration file; more is a mistake."""


class ConfigError(Exception):
    """A configuration file is wrong; nothing starts with it.

    Args:
        file: Path of the file, as given.
        line: Line from 1 where the place is, or ``None``.
        place: Dotted way to the value, such as ``rules.2.when.roles.0``; empty for the file.
        reason: What is wrong and what would be right.
    """

    def __init__(self, file: str, line: int | None, place: str, reason: str) -> None:
        super().__init__(file, line, place, reason)
        self.file = file
        self.line = line
        self.place = place
        self.reason = reason

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.place}: {self.reason}" if self.place else f"{where}: {self.reason}"


class YamlFile:
    """A parsed file that remembers the line of every value."""

    def __init__(self, file: str, data: Any, lines: Mapping[Place, int]) -> None:
        self.file = file
        self.data = data
        self._lines = lines

    def line(self, place: Place) -> int | None:
        """Line from 1 of a value, or of the nearest value around it."""
        for end in range(len(place), -1, -1):
            if (line := self._lines.get(place[:end])) is not None:
                return line
        return None

    def error(self, place: Place, reason: str) -> ConfigError:
        """Error at a place of this file."""
        return ConfigError(self.file, self.line(place), ".".join(map(str, place)), reason)


def read_yaml(path: str | Path) -> YamlFile:
    """Parse a YAML file.

    Raises:
        ConfigError: It cannot be read, is too large, is not YAML, or gives a key twice.
    """
    file = str(path)
    try:
        with Path(path).open("rb") as stream:
            text = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        reason = error.strerror or "not readable"
        raise ConfigError(file, None, "", f"cannot be read: {reason.lower()}") from None
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(file, None, "", f"is larger than {MAX_CONFIG_BYTES} bytes")
    lines: dict[Place, int] = {}
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _locate(node, (), lines, file)
        data = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise ConfigError(file, line, "", "is not valid YAML here") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(file, None, "", "is not valid YAML") from None
    finally:
        if loader is not None:
            loader.dispose()
    return YamlFile(file, data, lines)


def load_yaml_model(path: str | Path, model: type[Model]) -> Model:
    """Parse and validate a YAML file.

    Raises:
        ConfigError: As ``read_yaml``, or a value does not fit the model.
    """
    return validate(read_yaml(path), model)


def validate(source: YamlFile, model: type[Model]) -> Model:
    """Validate a parsed file; the error is the first one in file order.

    Raises:
        ConfigError: A value does not fit the model.
    """
    if not isinstance(source.data, dict):
        raise ConfigError(source.file, 1, "", "must be a mapping of keys to values")
    try:
        return model.model_validate(source.data)
    except ValidationError as failure:
        errors = failure.errors(include_input=False, include_url=False, include_context=False)
    # A list whose items are wrong is also reported as too short: the items are the cause.
    around = {tuple(e["loc"])[:end] for e in errors for end in range(len(e["loc"]))}
    causes = [e for e in errors if tuple(e["loc"]) not in around]
    raise min(
        (source.error(tuple(e["loc"]), e["msg"]) for e in causes), key=lambda e: e.line or 0
    ) from None


def _locate(node: yaml.Node | None, place: Place, lines: dict[Place, int], file: str) -> None:
    """Record the line of every value below ``node``, and refuse keys given twice."""
    if node is None:
        return
    lines[place] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _locate(item, (*place, i), lines, file)
    elif isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(file, line, "", "a key must be plain text")
            if key.value in seen:
                where = ".".join(map(str, (*place, key.value)))
                raise ConfigError(file, line, where, "is given twice")
            seen.add(key.value)
            _locate(value, (*place, key.value), lines, file)
            lines[(*place, key.value)] = line
