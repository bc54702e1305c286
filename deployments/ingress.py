"""``GatewayIngress``: the Serve deployment in front. Takes handles, builds the ``Gateway``.

The HTTP app is built inside the replica (a pickled FastAPI app breaks on locks in its
middleware), so Serve calls ``__serve_build_asgi_app__`` after construction. Holds no decision.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from deployments import __version__
from deployments.api.admin import AdminApi
from deployments.api.app import create_app
from deployments.api.completions import BodyLimits
from deployments.api.usage import UsageApi
from deployments.config import AppConfig
from deployments.control_actor import ControlClient
from deployments.data_plane.client import DataPlaneEngine
from deployments.data_plane.handle_engine import HandleEngine
from deployments.data_plane.tickets import TicketSigner
from deployments.data_plane.tls import client_context
from deployments.gateway_books import GatewayBooks
from deployments.jwks_fetch import JwksFetcher
from deployments.logs import join_serve_log
from deployments.routing.gateway_router import GatewayRouter
from deployments.routing.plan import RoutingPlan
from deployments.routing.shadow import shadow_runner
from deployments.settings import Settings
from deployments.telemetry.gateway import GatewayTelemetry
from governance.admission.limits import RateLimiter
from governance.admission.shedding import LoadShedder
from governance.control.snapshot import ControlSnapshot, GatewayIdentity
from governance.errors import NotPermitted
from governance.gateway import Gateway
from governance.identity.authenticator import BearerAuthenticator
from governance.identity.config import IdentityConfig
from governance.identity.service_keys import ServiceKeyChecker
from governance.nulls import NullInspector
from governance.policy.engine import CompiledPolicy
from governance.policy.model import PolicyConfig
from governance.shadow import ShadowRunner
from governance.shadow_tap import ShadowTap
from governance.types import Principal

log = logging.getLogger("gatehouse.ingress")

CONTROL_TIMEOUT_S = 60.0
"""Time that the control plane has to give a starting gateway its first copy."""


def now_us() -> int:
    """Wall clock in microseconds."""
    return time.time_ns() // 1000


class GatewayIngress:
    """One gateway replica: a process that identifies, decides and streams."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: dict[str, Any],
        identity: dict[str, Any],
        policy: dict[str, Any],
        budgets: dict[str, Any],
        roots: dict[str, str],
        engine_handles: dict[str, Any],
        routing: dict[str, Any],
        scorer_handle: Any = None,
    ) -> None:
        """Wire the gateway.

        Args:
            config: Dump of ``AppConfig``.
            identity: Dump of ``IdentityConfig``; validated where the application was built, so
                that every replica runs the same rules and needs no file.
            policy: Dump of ``PolicyConfig``; likewise.
            budgets: Dump of ``Budgets``; likewise.
            roots: Dump of ``Settings``: where this node keeps its state and its evidence.
            engine_handles: Serve handles by base model, for ``data_plane: handle``.
            routing: Dump of ``RoutingPlan``; validated where the application was built.
            scorer_handle: Serve handle of the scorer, where it has a deployment.
        """
        join_serve_log()
        self.config = AppConfig.model_validate(config)
        self.started_s = int(time.time())
        self.settings = Settings.load(roots)
        self.control = ControlClient(self.settings.state)
        key = Ed25519PrivateKey.generate()
        public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.gateway_id = f"gw-{public.hex()[:16]}"
        await self.control.start(GatewayIdentity(self.gateway_id, public))
        await self.control.ready(CONTROL_TIMEOUT_S)
        signer = TicketSigner(self.gateway_id, key, now_us)
        self.engine = self._build_engine(signer, engine_handles)
        self.policy = CompiledPolicy(PolicyConfig.model_validate(policy), self.config.model_infos())
        self.telemetry = GatewayTelemetry(
            self.gateway_id,
            [info.id for info in self.config.model_infos()],
            [model.id for model in self.config.models],
            self.engine.ready,
            self.control.age_s,
        )
        self.routing = GatewayRouter(
            RoutingPlan.load(routing), self.config.router, self.config.model_infos()
        )
        await self.routing.open(scorer_handle, self.telemetry.score_note)
        self.books = await self._open_books(budgets)
        self.shadow = self._start_shadow()
        self.gateway = self._build_gateway(
            IdentityConfig.model_validate(identity), await self.control.pepper()
        )
        for stage in (self.gateway.inspector, self.gateway.router):
            if announce := getattr(stage, "announce", None):
                log.warning(announce)

    async def __serve_build_asgi_app__(self) -> Any:
        """Build the HTTP application around the gateway."""
        limits = self.config.gateway
        return create_app(
            self.gateway,
            AdminApi(self.control, self._authorize),
            BodyLimits(limits.max_body_bytes, limits.body_timeout_s, limits.send_timeout_s),
            ready=self._ready,
            created_s=self.started_s,
            version=__version__,
            usage=UsageApi(
                self.books.ledger_client, self._authorize, tree=lambda: self.books.leases.tree
            ),
            tracing=self.telemetry.tracing,
        )

    async def __del__(self) -> None:
        """Finish what is being settled and recorded, then leave the control plane."""
        await self.gateway.drain()
        if self.shadow is not None:
            await self.shadow.close()
        await self.engine.close()
        await self.routing.close()
        await self.books.close()
        await self.telemetry.close()
        await self.control.stop()

    async def check_health(self) -> None:
        """Called by Serve: a gateway that can record nothing is replaced."""
        self.books.check()

    async def _open_books(self, budgets: dict[str, Any]) -> GatewayBooks:
        """Ledger and audit trail; what cannot be opened keeps the gateway from starting."""
        # Opens files and waits for the disk.
        books = await asyncio.to_thread(
            GatewayBooks, self.gateway_id, self.settings, budgets, now_us
        )
        await books.start()
        self.telemetry.watch_routing(self.routing.achieved, self.routing.batcher)
        self.telemetry.watch(books, self.settings)
        return books

    def _start_shadow(self) -> ShadowRunner | None:
        """Compare a sample of answers in idle time, where the models file says so."""
        config = self.routing.shadow
        if config is None:
            return None
        runner = shadow_runner(
            config,
            policy=self.policy,
            ledger=self.books.ledger,
            audit=self.books.turns,
            engine=self.engine,
            clock=now_us,
            max_answer_tokens=self.config.gateway.max_answer_tokens,
        )
        runner.start()
        self.telemetry.watch_shadow(runner.stats)
        return runner

    def _ready(self) -> dict[str, bool]:
        """Models by their place in the file: whoever may not use one must not learn its name."""
        models = {
            f"model {place}": self.engine.ready(model.id)
            for place, model in enumerate(self.config.models, 1)
        }
        return {"control plane": self.control.age_s() < 10, **models}

    def _authorize(self, principal: Principal, permission: str) -> None:
        if not self.policy.permits(principal, permission):
            raise NotPermitted(f"This needs the permission {str(permission)!r}.")

    def _build_engine(
        self, signer: TicketSigner, handles: dict[str, Any]
    ) -> DataPlaneEngine | HandleEngine:
        limits = self.config.gateway
        if limits.data_plane == "handle":
            return HandleEngine(
                handles,
                signer,
                start_timeout_s=limits.start_timeout_s,
                chunk_timeout_s=limits.chunk_timeout_s,
            )
        engine = DataPlaneEngine(
            signer,
            tls=client_context(os.environ),
            start_timeout_s=limits.start_timeout_s,
            chunk_timeout_s=limits.chunk_timeout_s,
            max_in_flight={m.id: m.max_in_flight for m in self.config.models},
        )
        self.control.on_change(lambda snapshot: engine.update(snapshot.replicas))
        return engine

    def _build_gateway(self, identity: IdentityConfig, pepper: bytes) -> Gateway:
        local = self.config.mode == "local"

        def snapshot() -> ControlSnapshot:
            return self.control.snapshot

        def share() -> float:
            return 1 / max(1, len(snapshot().gateways))

        shedder = LoadShedder(
            [model.id for model in self.config.models],
            self.engine.load,
            time.monotonic,
            self.config.queue_limits(),
            share,
        )
        self.telemetry.watch_shedding(lambda: shedder.stats)
        return Gateway(
            models=self.config.model_infos(),
            authenticator=BearerAuthenticator(
                identity,
                fetch=JwksFetcher(allow_loopback_http=local),
                pepper=pepper,
                service_keys=ServiceKeyChecker(
                    snapshot, self.control.age_s, pepper, now_us, self.control.note_key_used
                ),
                revocations=lambda: snapshot().revocations,
                clock=now_us,
                monotonic=time.monotonic,
                allow_loopback_http=local,
            ),
            policy=self.policy,
            limiter=RateLimiter(time.monotonic, share=share),
            inspector=NullInspector(),
            router=self.routing.port(self.engine.load, lambda: self.books.leases.price, now_us),
            ledger=self.books.ledger,
            audit=ShadowTap(self.books.audit, self.shadow) if self.shadow else self.books.audit,
            engine=self.engine,
            clock=now_us,
            max_answer_tokens=self.config.gateway.max_answer_tokens,
            observer=self.telemetry.observer,
            shedder=shedder,
        )
