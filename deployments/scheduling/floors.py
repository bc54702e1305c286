"""What is kept free in an engine for critical requests, step by step. Runs in the engine core.

While a critical request was there in the last half minute (``critical_seen_us``):

- **Places and KV cache.** Others start only where a part of both stays free for critical ones, of
  places what critical ones have not taken. With nothing running everybody may start.
- **Tokens.** A step cannot be interrupted, so one that is full of prompts makes whoever comes next
  wait for its end. Others' prompts take a quarter of a step at most. In a step that computes a
  critical prompt there are none of others: unfinished ones pause, keeping their KV cache, and
  nobody else starts. Answers that run go on.

A floor is given up where it helps nobody: where no critical request came of a step that was kept
for one (its grammar is being compiled, or there is no room), others' prompts go on for the next
``NO_PAUSE_STEPS``; and nothing pauses where a critical request needs KV cache that is held by who
would pause, because only who runs can be preempted.

So an engine is never idle while somebody waits, but for one look at the queue. What it costs: the
reserved places may stand empty while critical requests come less than half a minute apart.
"""

from __future__ import annotations

from collections.abc import Container

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from routing.fairness import FairSettings

FEWEST_SEQS = 4
"""An engine that runs fewer at once reserves no place: one of three would be a third of it."""
LEAST_PROMPT_TOKENS = 64
"""Of a step, for prompts that are not critical, however many answers run."""
NO_PAUSE_STEPS = 16
"""Others' prompts do not pause for so many steps after a pause that helped nobody."""


class Floors:
    """Floors of one scheduler.

    Args:
        scheduler: Whose.
        settings: Shares.
    """

    def __init__(self, scheduler: Scheduler, settings: FairSettings) -> None:
        self.urgent: dict[str, Request] = {}
        """Critical requests that wait or run."""
        self._scheduler = scheduler
        self._settings = settings
        self._urgent_us = -(1 << 62)
        """When one was last here."""
        self._kept = False
        """Whether floors hold in this step."""
        self._reserved = False
        """Whether this step is for critical prompts."""
        self._prompts: list[str] = []
        """Critical requests whose prompts are waited for."""
        self._paused = 0
        """Requests that are kept out of the step."""
        self._taken = (0, 0)
        """How many ran when it was counted, and how many of them are critical."""
        self._held = False
        """Whether somebody was kept from starting, or paused, because of that."""
        self._no_pause_until = 0

    def begin(self, now_us: int) -> list[Request]:
        """A step begins.

        Returns:
            Requests taken out of ``running`` for the step, for the caller to put back.
        """
        if self.urgent:
            self._urgent_us = now_us
        self._kept = now_us - self._urgent_us <= self._settings.critical_seen_us
        prompts = [r for r in self.urgent.values() if _computes_prompt(r)]
        self._prompts = [request.request_id for request in prompts]
        self._held, self._taken = False, (0, 0)
        self._reserved = bool(prompts) and self._scheduler.current_step >= self._no_pause_until
        paused: list[Request] = []
        if self._reserved and self._fit(prompts):
            running = self._scheduler.running
            paused = [r for r in running if r.is_prefill_chunk and r.request_id not in self.urgent]
            if paused:
                out = set(paused)
                self._scheduler.running = [r for r in running if r not in out]
                self._held = True
        self._paused = len(paused)
        return paused

    def end(self, scheduled: Container[str]) -> None:
        """A step was made up.

        Args:
            scheduled: Ids of who is in it.
        """
        self._paused = 0
        if self._reserved and self._held and not any(name in scheduled for name in self._prompts):
            self._no_pause_until = self._scheduler.current_step + NO_PAUSE_STEPS
        self._reserved = False

    def may_start(self, request: Request) -> bool:
        """Whether the floors let a request start in this step."""
        scheduler, settings = self._scheduler, self._settings
        running, most = len(scheduler.running) + self._paused, scheduler.max_num_running_reqs
        if self._paused and running >= most:
            return False  # vLLM does not count those that pause
        if not self._kept or not running or request.request_id in self.urgent:
            return True
        if self._reserved:
            self._held = True
            return False
        places = 0
        if most >= FEWEST_SEQS:
            places = max(1, most * settings.reserved_slots_milli // 1000)
        taken = self._critical(running)
        if most - running <= max(0, places - taken):
            return False
        pool = scheduler.kv_cache_manager.block_pool
        floor = pool.num_gpu_blocks * settings.reserved_kv_milli // 1000
        if taken or not floor:  # A model without attention has no cache.
            return True
        return bool(pool.get_num_free_blocks() - self._blocks(request) >= floor)

    def step_tokens(self, full: int) -> int:
        """Tokens of a step: fewer, where a critical request may come while it runs.

        Args:
            full: What vLLM would take.
        """
        scheduler = self._scheduler
        if (
            not self._kept
            or self._reserved
            or not scheduler.scheduler_config.enable_chunked_prefill
        ):
            return full
        most = full * (1000 - self._settings.reserved_tokens_milli) // 1000
        answers = len(scheduler.running) * (1 + scheduler.num_spec_tokens)
        return min(full, max(most, answers + LEAST_PROMPT_TOKENS))

    def short_of_cache(self, tokens: int) -> bool:
        """Whether somebody may be preempted in a step of so many tokens."""
        scheduler = self._scheduler
        pool = scheduler.kv_cache_manager.block_pool
        most = len(scheduler.running) + tokens // scheduler.block_size
        return pool.get_num_free_blocks() < max(2 * most, pool.num_gpu_blocks // 8)

    def _critical(self, running: int) -> int:
        """How many of those that run are critical; counted again where somebody has started."""
        if self._taken[0] != running:
            taken = sum(r.status == RequestStatus.RUNNING for r in self.urgent.values())
            self._taken = (running, taken)
        return self._taken[1]

    def _fit(self, prompts: list[Request]) -> bool:
        """Whether critical prompts, and a block for each that runs, fit beside who would pause."""
        scheduler = self._scheduler
        needed = sum(self._blocks(request) for request in prompts) + len(scheduler.running)
        return scheduler.kv_cache_manager.block_pool.get_num_free_blocks() >= needed

    def _blocks(self, request: Request) -> int:
        """KV blocks of what is not computed yet."""
        left = request.num_tokens - request.num_computed_tokens
        return -(-left // self._scheduler.block_size)


def _computes_prompt(request: Request) -> bool:
    """Whether a request could start now, or its prompt is being computed."""
    if request.status == RequestStatus.RUNNING:
        return bool(request.is_prefill_chunk)
    return request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
