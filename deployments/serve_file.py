"""``serve_config*.yaml`` as ``gatehouse`` reads it: Serve's own keys, and our ``args``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from deployments.config import AppConfig, Section
from governance.yaml_config import load_yaml_model

DEFAULT_CHECKPOINTS = Path("data") / "checkpoints"
"""Under the configuration root; what the project builds itself."""


class HttpSection(Section):
    """Serve's HTTP options; those not named here are passed on unchanged."""

    model_config = ConfigDict(extra="allow", frozen=True)

    host: str = "127.0.0.1"
    """Address that the proxy listens on."""
    port: int = Field(default=8000, ge=1, le=65535)


class ApplicationSection(Section):
    """The one application."""

    name: str = "gatehouse"
    route_prefix: Literal["/"] = "/"
    import_path: Literal["deployments.app:build_app"]
    args: AppConfig


class ServeFile(Section):
    """A whole file."""

    proxy_location: Literal["HeadOnly", "EveryNode", "Disabled"] = "EveryNode"
    http_options: HttpSection = HttpSection()
    logging_config: dict[str, Any] = Field(default_factory=dict)
    """Serve's logging configuration, passed on unchanged."""
    applications: tuple[ApplicationSection] = Field(min_length=1, max_length=1)

    @property
    def application(self) -> ApplicationSection:
        """The one application."""
        return self.applications[0]

    @property
    def app(self) -> AppConfig:
        """What runs."""
        return self.application.args

    def with_port(self, port: int | None) -> ServeFile:
        """The same on another port."""
        if port is None:
            return self
        return self.model_copy(
            update={"http_options": self.http_options.model_copy(update={"port": port})}
        )

    @property
    def url(self) -> str:
        """Base URL as seen from this machine."""
        host = self.http_options.host
        shown = "127.0.0.1" if host in {"0.0.0.0", "::", ""} else host  # noqa: S104
        return f"http://{shown}:{self.http_options.port}"

    def checkpoint_folder(self, root: Path) -> Path | None:
        """Folder of the checkpoints to build, if a model is served from there."""
        folder = (root / DEFAULT_CHECKPOINTS).resolve()
        for model in self.app.models:
            if not model.is_hub and (root / model.source).resolve().parent == folder:
                return folder
        return None


def load_serve_file(path: Path) -> ServeFile:
    """Read and validate.

    Raises:
        ConfigError: With file, line, place and reason.
    """
    return load_yaml_model(path, ServeFile)
