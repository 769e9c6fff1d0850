"""Prometheus metrics, fed by events. Closed label sets: no tenant, key or raw path.

Children are bound once and kept: looking labels up costs more than counting.

Where ``PROMETHEUS_MULTIPROC_DIR`` names a folder when this is imported, the library
keeps all figures in files there: any process shows those of all that share the folder,
counters summed up over the dead ones too, gauges of the living as each says (``how``).
With ``keep_by_seat`` a process goes on with the counters of the one before it there, so
that the files do not become more with every restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    multiprocess,
    values,
)

from gateway.core.events import (
    AttemptFinished,
    BreakerChanged,
    ConfigRead,
    Event,
    HoldRefused,
    Journaled,
    PressureChanged,
    RequestFinished,
    RequestShed,
    SharedStateChanged,
    StoreChanged,
    TaskFinished,
    UpstreamChanged,
    WebhookTried,
)

NANO = 1e9
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 300)
"""Image calls take 5 to 300 seconds; the library's own buckets end at 10."""
STATES = ("closed", "open", "half_open", "paused")
disable_created_metrics()  # type: ignore[no-untyped-call]  # else two series per child
SHARED = values.ValueClass is not values.MutexValue
"""Whether the figures are those of several processes."""
How = Literal["livemax", "livemin", "livesum", "livemostrecent"]
METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}


def keep_by_seat(seat: int) -> None:
    """Keep the figures of this process in the files of its seat, from now on."""
    if SHARED:
        values.ValueClass = values.MultiProcessValue(lambda: seat)  # type: ignore[no-untyped-call]


class Metrics:
    """Counts events; renders what it counted."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._sampled: dict[Gauge, Callable[[], float]] = {}

        def counter(name: str, doc: str, *labels: str) -> Callable[..., Counter]:
            metric = Counter(f"imageway_{name}", doc, labels, registry=self.registry)
            return cache(metric.labels)

        def seconds(name: str, doc: str, *labels: str) -> Callable[..., Histogram]:
            metric = Histogram(
                f"imageway_{name}", doc, labels, registry=self.registry, buckets=SECONDS
            )
            return cache(metric.labels)

        self._requests = counter(
            "http_requests", "HTTP requests answered.", "route", "method", "status"
        )
        self._request_s = seconds(
            "http_request_duration_seconds", "Time to answer.", "route"
        )
        self._attempts = counter(
            "attempts", "Calls to upstreams.", "upstream", "variant", "outcome"
        )
        self._attempt_s = seconds(
            "attempt_duration_seconds", "Time of a call to an upstream.", "upstream"
        )
        self._cost = counter(
            "upstream_cost_usd",
            "What upstreams charge the operator; billed says for which attempts.",
            "upstream",
            "billed",
        )
        self._tasks = counter("tasks", "Tasks finished.", "variant", "state", "served")
        self._task_s = seconds("task_duration_seconds", "Life of a task.", "variant")
        self._saved = counter(
            "saved_by_fallback", "Tasks delivered after a failed attempt.", "variant"
        )
        self._images = counter("images", "Pictures delivered.", "variant")
        self._tokens = counter("tokens", "Tokens settled.", "variant", "class")
        self._charged = counter("charged_credits", "Credits charged.", "variant")
        self._absorbed = counter(
            "absorbed_credits", "Charges beyond hold and balance.", "variant"
        )
        self._estimated = counter(
            "estimated_settlements", "Settled without reported usage.", "variant"
        )
        self._refused = counter("holds_refused", "Refused for credits.", "variant")
        self._webhooks = counter("webhook_deliveries", "Webhooks tried.", "outcome")
        self._journaled = counter(
            "journal_entries", "Kept while the database was away.", "outcome"
        )
        self._shed = counter(
            "shed", "Requests refused because too many wait.", "variant", "reason"
        )
        shedding = Gauge(
            "imageway_shedding",
            "1 while new work is refused because of the process itself.",
            ("signal",),
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._shedding: Callable[..., Gauge] = cache(shedding.labels)
        self._states = Gauge(
            "imageway_breaker_state",
            "1 for the state that the breaker is in.",
            ("offer", "state"),
            registry=self.registry,
            multiprocess_mode="livemostrecent",
        )
        self._state: Callable[..., Gauge] = cache(self._states.labels)
        self._opened = counter("breaker_openings", "Breakers opened.", "offer")
        self._drains = Gauge(
            "imageway_upstream_drained",
            "1 while an operator lets nothing new go there.",
            ("upstream",),
            registry=self.registry,
            multiprocess_mode="livemostrecent",
        )
        self._drained: Callable[..., Gauge] = cache(self._drains.labels)
        self._store_away = Gauge(
            "imageway_picture_store_away",
            "1 while the object store takes no pictures; 0 with pictures on disk.",
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._degraded = Gauge(
            "imageway_shared_state_degraded",
            "1 while each process decides alone because Redis is out of reach.",
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._reload_ok = Gauge(
            "imageway_config_last_reload_successful",
            "0 while an older configuration goes on because the last was refused.",
            registry=self.registry,
            multiprocess_mode="livemin",
        )
        self._reload_ok.set(1)
        self._reload_at = Gauge(
            "imageway_config_last_reload_success_timestamp_seconds",
            "When the configuration in use was read.",
            registry=self.registry,
            multiprocess_mode="livemin",
        )
        self._reload_at.set_to_current_time()
        self._line = Gauge(
            "imageway_waiting",
            "Sync requests let in that have no slot yet.",
            ("variant",),
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._lag = Gauge(
            "imageway_event_loop_lag_seconds",
            "How late the event loop is, over the last second.",
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._offers, self._told = frozenset[str](), dict[str, str]()
        self.drift = Gauge(
            "imageway_ledger_drift_nanocredits",
            "Sum of all drift that the last audit found; must be 0.",
            registry=self.registry,
            multiprocess_mode="livemax",
        )

    def watch_log(self, dropped_lines: Callable[[], int]) -> None:
        """Show how many log lines were lost."""
        lost = Gauge(
            "imageway_log_lines_dropped",
            "Log lines that the sink did not take since the start.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._sampled[lost] = dropped_lines

    def watch_journal(self, waiting: Callable[[], int]) -> None:
        """Show how much the database does not have yet."""
        gauge = Gauge(
            "imageway_journal_waiting",
            "Entries kept on the disk until the database is back.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._sampled[gauge] = waiting

    def watch_waiting(
        self,
        variants: Iterable[str],
        waiting: Callable[[str], int],
        lag_ms: Callable[[], float],
    ) -> None:
        """Show who waits for a slot, and how late the event loop is."""
        for variant in variants:
            self._sampled[self._line.labels(variant)] = partial(waiting, variant)
        self._sampled[self._lag] = lambda: lag_ms() / 1000

    def watch_fleet(self, processes: Callable[[], int]) -> None:
        """Show how many processes share the upstreams' slots."""
        fleet = Gauge(
            "imageway_fleet_processes",
            "Processes that share the upstreams, as this one sees them.",
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self._sampled[fleet] = processes

    def known(self, offer_ids: list[str], variants: list[str]) -> None:
        """Show every offer and variant from the start, at zero.

        Those that were known before stay as they are; of what is not among them any
        more no state is shown.
        """
        before, self._offers = self._offers, frozenset(offer_ids)
        for offer_id in before - self._offers:
            for each in STATES:
                self._state(offer_id, each).set(0)  # what others show of it stays
                _take_out(self._states, offer_id, each)
        for upstream in _upstreams_of(before) - _upstreams_of(self._offers):
            self._drained(upstream).set(0)
            _take_out(self._drains, upstream)
        self._state = cache(self._states.labels)
        self._drained = cache(self._drains.labels)
        for offer_id in self._offers - before:
            self._show_state(offer_id, self._told.get(offer_id, "closed"))
            self._drained(offer_id.partition("/")[0])
        for variant in variants:
            self._saved(variant)
            self._images(variant)

    def on_event(self, event: Event) -> None:
        """Count one event."""
        match event:
            case RequestFinished():
                self._on_request(event)
            case AttemptFinished():
                self._on_attempt(event)
            case TaskFinished():
                self._on_task(event)
            case BreakerChanged():
                self._on_breaker(event)
            case UpstreamChanged() | SharedStateChanged():
                self._on_change(event)
            case StoreChanged() | WebhookTried() | ConfigRead():
                self._on_other(event)
            case HoldRefused() | RequestShed() | PressureChanged() | Journaled():
                self._on_pressure(event)

    async def sample(self) -> None:
        """Set what is looked at rather than told of; for what others show of it."""
        for gauge, value in self._sampled.items():
            gauge.set(value())

    async def render(self) -> tuple[bytes, str]:
        """Write all metrics in Prometheus' text format; with its media type."""
        await self.sample()
        if not SHARED:
            return generate_latest(self.registry), CONTENT_TYPE_LATEST
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        text = await asyncio.to_thread(generate_latest, registry)
        return text, CONTENT_TYPE_LATEST

    def _on_other(self, event: StoreChanged | WebhookTried | ConfigRead) -> None:
        match event:
            case StoreChanged():
                self._store_away.set(event.state == "away")
            case WebhookTried():
                self._webhooks(event.outcome).inc()
            case ConfigRead():
                self._reload_ok.set(event.outcome != "refused")
                if event.outcome == "reloaded":
                    self._reload_at.set_to_current_time()

    def _on_breaker(self, event: BreakerChanged) -> None:
        self._told[event.offer_id] = event.state
        # A call may end after its offer was taken out of the configuration.
        if event.offer_id in self._offers:
            self._show_state(event.offer_id, event.state)
        if event.state == "open":
            self._opened(event.offer_id).inc()

    def _on_change(self, event: UpstreamChanged | SharedStateChanged) -> None:
        if isinstance(event, SharedStateChanged):
            self._degraded.set(event.degraded)
        elif event.change != "reset":
            self._drained(event.upstream).set(event.change == "drained")

    def _on_request(self, event: RequestFinished) -> None:
        method = event.method if event.method in METHODS else "other"
        self._requests(event.route, method, str(event.status)).inc()
        self._request_s(event.route).observe(event.duration_ms / 1000)

    def _on_attempt(self, event: AttemptFinished) -> None:
        self._attempts(event.upstream, event.variant, event.outcome).inc()
        self._attempt_s(event.upstream).observe(event.duration_ms / 1000)
        if event.cost_nanousd:
            billed = "won" if event.outcome == "done" else event.billed
            self._cost(event.upstream, billed).inc(event.cost_nanousd / NANO)

    def _on_task(self, event: TaskFinished) -> None:
        variant = event.variant
        self._tasks(variant, event.state, event.served).inc()
        self._task_s(variant).observe(event.duration_ms / 1000)
        self._images(variant).inc(event.images)
        self._charged(variant).inc(event.charged_nanocredits / NANO)
        self._absorbed(variant).inc(event.absorbed_nanocredits / NANO)
        if event.saved_by_fallback:
            self._saved(variant).inc()
        if event.usage_source == "estimated":
            self._estimated(variant).inc()
        if event.usage is not None:
            for token_class in event.usage.__slots__:
                count = getattr(event.usage, token_class)
                self._tokens(variant, token_class).inc(count)

    def _on_pressure(
        self, event: HoldRefused | RequestShed | PressureChanged | Journaled
    ) -> None:
        match event:
            case Journaled():
                self._journaled(event.outcome).inc()
            case HoldRefused():
                self._refused(event.variant).inc()
            case RequestShed():
                self._shed(event.variant, event.reason).inc()
            case PressureChanged():
                self._shedding(event.signal).set(event.on)

    def _show_state(self, offer_id: str, state: str) -> None:
        for each in STATES:
            self._state(offer_id, each).set(each == state)


def _upstreams_of(offer_ids: Iterable[str]) -> set[str]:
    return {offer_id.partition("/")[0] for offer_id in offer_ids}


def _take_out(gauge: Gauge, *labels: str) -> None:
    if not SHARED:  # there the library cannot
        gauge.remove(*labels)


def forget_process(folder: Path, seat: int) -> None:
    """Take the gauges of a process that has ended out of a folder of figures."""
    multiprocess.mark_process_dead(seat, str(folder))  # type: ignore[no-untyped-call]
