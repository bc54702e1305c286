"""What runs: the ``args`` of the application in ``serve_config*.yaml``.

What is *allowed* lives in ``config/*.yaml``; secrets and roots come from the environment and
mounted files (``deployments.settings``). A bad value refuses to start with its place and reason.
"""

# NOTE: no ``from __future__ import annotations`` here: Serve looks the builder's argument type up
# at run time to validate ``args``.
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from governance.admission.shedding import QueueLimits
from governance.selection import AUTO
from governance.types import ModelInfo, Operation


class Section(BaseModel):
    """Base of all sections: immutable, and a name that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterConfig(Section):
    """A LoRA adapter served beside its base model, under an id of its own."""

    id: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")
    """Public model id."""
    source: str = Field(min_length=1)
    """Directory with ``adapter_config.json``, or a hub id."""
    max_rank: int = Field(default=16, ge=1, le=512)
    """Largest rank of the adapter."""


class AcceleratorConfig(Section):
    """Where one replica of a model runs."""

    kind: Literal["cpu", "gpu"] = "gpu"
    """``cpu`` needs the CPU build of vLLM."""
    type: str | None = None
    """Ray accelerator type, such as ``H100`` or ``L4``; ``None`` takes any GPU."""
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """GPUs that one layer is split over."""
    pipeline_parallel: int = Field(default=1, ge=1, le=64)
    """Groups of layers that are placed apart."""
    cpus: float = Field(default=1.0, ge=0.0)
    """CPUs reserved for the replica actor."""

    @property
    def device(self) -> str | None:
        """Kind of device, as budgets name it; ``None`` where any GPU will do."""
        return "cpu" if self.kind == "cpu" else self.type

    @model_validator(mode="after")
    def _cpu_is_single(self) -> "AcceleratorConfig":
        if self.kind == "cpu" and (self.type or self.tensor_parallel * self.pipeline_parallel > 1):
            raise ValueError("kind: cpu takes neither a type nor tensor or pipeline parallelism")
        return self


class ReplicasConfig(Section):
    """How many replicas a deployment has."""

    min: int = Field(default=1, ge=0)
    """Replicas kept when idle."""
    max: int = Field(default=1, ge=1)
    """Replicas at most."""
    target_load: int = Field(default=16, ge=1)
    """Requests running or waiting per replica that autoscaling aims at."""

    @model_validator(mode="after")
    def _ordered(self) -> "ReplicasConfig":
        if self.min > self.max:
            raise ValueError("replicas.min is greater than replicas.max")
        return self


class QueueShares(Section):
    """How much of a queue each class of service may use, in per cent of `max_waiting`.

    Everybody who waits is counted, whatever the class; of other departments of the same class no
    more than their part. So batch work is turned away first, critical work last.
    """

    critical: int = Field(default=100, ge=1, le=100)
    """Of critical requests."""
    standard: int = Field(default=80, ge=1, le=100)
    """Of standard requests."""
    batch: int = Field(default=50, ge=1, le=100)
    """Of batch requests."""

    @model_validator(mode="after")
    def _by_urgency(self) -> "QueueShares":
        if not self.critical >= self.standard >= self.batch:
            raise ValueError("a class may not use more of the queue than a more urgent one")
        return self


class QueuePatience(Section):
    """Longest wait of each class for an engine to begin, in seconds.

    A request whose estimated wait is longer is refused at once (429 `overloaded`, with a
    `Retry-After`), and one that has waited so long in the engine is ended.
    """

    critical: float = Field(default=10.0, gt=0, le=86_400)
    """Of critical requests."""
    standard: float = Field(default=60.0, gt=0, le=86_400)
    """Of standard requests."""
    batch: float = Field(default=600.0, gt=0, le=86_400)
    """Of batch requests."""


class QueueConfig(Section):
    """Requests that wait for a model's engines, and who is turned away when too many do."""

    max_waiting: int = Field(default=128, ge=1, le=100_000)
    """Requests that may wait for one replica, of all classes; more are refused with 429
    `overloaded`. A good value is what a replica completes within the patience of standard
    requests: a longer queue only holds requests that are ended unserved."""
    share_percent: QueueShares = QueueShares()
    patience_s: QueuePatience = QueuePatience()

    @property
    def limits(self) -> QueueLimits:
        """The same for ``governance.admission.shedding``."""
        patience = self.patience_s.model_dump()
        return QueueLimits(
            waiting=self.max_waiting,
            share_percent=self.share_percent.model_dump(),
            patience_ms={each: round(1000 * value) for each, value in patience.items()},
        )


class ModelConfig(Section):
    """One model: its weights, where it runs, and how vLLM is set up for it."""

    id: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")
    """Public model id, the ``model`` of a request."""
    tier: Literal["small", "large", "embedding"]
    """Tier that policies and the router speak of."""
    source: str = Field(min_length=1)
    """Directory of a checkpoint, or a Hugging Face hub id."""
    revision: str | None = None
    """Commit of a hub repository; required for a hub id so that a restart cannot change weights."""
    operations: tuple[Operation, ...] = (Operation.CHAT, Operation.COMPLETIONS)
    """What it answers."""
    context_tokens: int = Field(ge=16)
    """Longest prompt plus answer, in tokens (vLLM's ``max_model_len``)."""
    accelerator: AcceleratorConfig = AcceleratorConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    max_in_flight: int = Field(default=256, ge=1)
    """Requests that one replica takes at once; the rest is told to come back."""
    queue: QueueConfig | None = None
    """Queue of this model, where it differs from the application's."""
    adapters: tuple[AdapterConfig, ...] = ()
    engine: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments, passed unchanged."""

    @model_validator(mode="after")
    def _never_to_zero(self) -> "ModelConfig":
        if self.replicas.min < 1:
            raise ValueError(
                "replicas.min must be at least 1: requests reach engines without Serve, so a "
                "model that went to zero would not be woken"
            )
        return self

    @field_validator("engine")
    @classmethod
    def _ours_alone(cls, engine: dict[str, Any]) -> dict[str, Any]:
        """Arguments that other fields set may not be set twice."""
        taken = {
            "model",
            "served_model_name",
            "revision",
            "max_model_len",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "enable_lora",
            "lora_modules",
            # With fewer than there are, a prompt that pauses would come back as one too many.
            "max_loras",
            "max_lora_rank",
            # The meter's.
            "scheduler_cls",
        } & engine.keys()
        if taken:
            raise ValueError(f"set by other fields, not here: {', '.join(sorted(taken))}")
        return engine

    @property
    def is_hub(self) -> bool:
        """Whether ``source`` is a hub id and not a directory."""
        return not (self.source.startswith((".", "/", "~")) or Path(self.source).is_dir())

    def infos(self) -> tuple[ModelInfo, ...]:
        """The ids this model serves: itself first, then its adapters."""
        return tuple(
            ModelInfo(
                id=served,
                tier=self.tier,
                operations=frozenset(self.operations),
                context_tokens=self.context_tokens,
                base=self.id,
            )
            for served in (self.id, *(adapter.id for adapter in self.adapters))
        )


class GatewayConfig(Section):
    """The HTTP side."""

    replicas: ReplicasConfig = ReplicasConfig()
    cpus: float = Field(default=1.0, ge=0.0)
    """CPUs reserved for each gateway replica."""
    max_ongoing_requests: int = Field(default=512, ge=1)
    """Requests one gateway replica works on at once."""
    max_queued_requests: int = Field(default=256, ge=0)
    """Requests waiting in front of the gateways before they are refused with 503."""
    max_body_bytes: int = Field(default=8 << 20, ge=1024, le=64 << 20)
    """Largest request body."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """Time a client has to send its body."""
    send_timeout_s: float = Field(default=60.0, gt=0)
    """Time a client may take to receive one piece of a streamed answer; then it is cut off."""
    start_timeout_s: float = Field(default=30.0, gt=0)
    """Time an engine has to take a request."""
    chunk_timeout_s: float = Field(default=120.0, gt=0)
    """Longest silence of an engine in mid-answer."""
    max_answer_tokens: int = Field(default=4096, ge=1)
    """Answer tokens per choice where neither client nor policy sets a bound."""
    data_plane: Literal["socket", "handle"] = "socket"
    """``socket``: own pooled connections; ``handle``: Serve handles, the slower reference."""


class RouterConfig(Section):
    """The scorer of prompts behind the model `auto`; which model it leads to is in the models file.

    Nothing is scored where fewer than two served models have a card there.
    """

    place: Literal["gateway", "deployment"] = "deployment"
    """``deployment``: Serve replicas of its own, which several gateways share; ``gateway``: a
    thread in each gateway, which saves the way there."""
    artefact: str | None = None
    """Folder of a trained scorer, the same on every node; ``None`` for the built-in one."""
    replicas: ReplicasConfig = ReplicasConfig(target_load=4)
    """Of the deployment."""
    cpus: float = Field(default=1.0, ge=0.0)
    """CPUs reserved for each replica of the deployment."""
    gpus: float = Field(default=0.0, ge=0.0, le=1.0)
    """GPU of a replica, or a part of one; needs onnxruntime with CUDA. The built-in scorer, which
    has 8-bit matrices for CPUs, gains nothing from one."""
    threads: int = Field(default=1, ge=1, le=64)
    """Threads that score one prompt."""
    max_batch: int = Field(default=16, ge=1, le=256)
    """Prompts that are scored together. On a CPU a batch of 16 gives about a quarter more scores
    than single prompts, and near capacity fewer of them are late; all that are in a batch wait for
    its end."""
    batch_wait_ms: float = Field(default=0.0, ge=0.0, le=1000.0)
    """How long a batch that follows another may wait to become full; the first never does."""
    max_waiting: int = Field(default=64, ge=1, le=10_000)
    """Prompts waiting at one scorer; more go without a score at once."""

    @model_validator(mode="after")
    def _gpu_has_a_place(self) -> "RouterConfig":
        if self.gpus and self.place == "gateway":
            raise ValueError("router.gpus: a gateway has no GPU; use place: deployment")
        if self.replicas.min < 1:
            raise ValueError("router.replicas.min must be at least 1")
        return self


class AppConfig(Section):
    """Argument of ``deployments.app:build_app``."""

    mode: Literal["cluster", "local"] = "cluster"
    """``local`` allows the development identity provider and plain HTTP on loopback."""
    identity: str = "config/identity.yaml"
    """Path of the identity file."""
    policy: str = "config/policy.yaml"
    """Path of the policy file."""
    budgets: str = "config/budgets.yaml"
    """Path of the budgets file."""
    models_file: str = "config/models.yaml"
    """Path of the models file: what each model can do, and how `auto` chooses among them."""
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    gateway: GatewayConfig = GatewayConfig()
    queue: QueueConfig = QueueConfig()
    router: RouterConfig = RouterConfig()

    @model_validator(mode="after")
    def _unique_ids(self) -> "AppConfig":
        seen: set[str] = set()
        for info in self.model_infos():
            if info.id in seen:
                raise ValueError(f"model id {info.id!r} is used twice")
            seen.add(info.id)
        if AUTO in seen:
            raise ValueError(f"no model may be called {AUTO!r}: by it callers leave the choice")
        for model in self.models:
            if self.mode == "cluster" and model.is_hub and model.revision is None:
                raise ValueError(f"model {model.id!r}: pin a revision (commit) of {model.source!r}")
        return self

    def queue_limits(self) -> dict[str, QueueLimits]:
        """Bounds of the queue of each base model."""
        return {model.id: (model.queue or self.queue).limits for model in self.models}

    def model_infos(self) -> tuple[ModelInfo, ...]:
        """All served ids, adapters included, in file order."""
        return tuple(info for model in self.models for info in model.infos())
