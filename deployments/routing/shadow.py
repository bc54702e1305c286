"""Wires shadow traffic into a gateway: ``config/models.yaml``, section ``routing.shadow``."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from deployments.routing.scoring import BUILT_IN
from governance.audit.turns import TurnAudit
from governance.ports import Clock, Engine, Ledger, Policy
from governance.shadow import ShadowRunner
from routing.agreement import Similarity, cosine
from routing.cards import Shadow


def shadow_runner(
    config: Shadow,
    *,
    policy: Policy,
    ledger: Ledger,
    audit: TurnAudit,
    engine: Engine,
    clock: Clock,
    max_answer_tokens: int,
    artefact: Path = BUILT_IN,
) -> ShadowRunner:
    """The runner of one gateway.

    Start it, put a ``ShadowTap`` before the trail, close it before trail and ledger are closed.

    Args:
        config: Share, account and rate.
        policy: Of the gateway.
        ledger: Of the gateway; the configured account must be one of its.
        audit: The trail itself, not the tap: shadows are not shadowed.
        engine: Of the gateway.
        clock: Wall clock, microseconds.
        max_answer_tokens: Of the gateway.
        artefact: Whose encoder compares texts.
    """
    return ShadowRunner(
        share_milli=config.share_milli,
        account=config.account,
        max_per_minute=config.max_per_minute,
        max_answer_tokens=max_answer_tokens,
        policy=policy,
        ledger=ledger,
        audit=audit,
        shadow_log=audit,
        engine=engine,
        clock=clock,
        monotonic=time.monotonic,
        similarity=encoder_similarity(artefact),
    )


def encoder_similarity(folder: Path) -> Similarity:
    """Cosine by the encoder of an artefact, which is loaded when it is first needed; blocks.

    A gateway whose scorer is elsewhere needs the encoder for nothing else, and most answers are
    compared without it.
    """
    lock = threading.Lock()
    opened: list[Similarity] = []

    def similarity(one: str, other: str) -> float:
        with lock:
            if not opened:
                from routing import artefact
                from routing.encoder import Encoder

                encoder = Encoder(artefact.load(folder))
                opened.append(cosine(lambda texts: encoder.encode(texts).frozen))
        return opened[0](one, other)

    return similarity
