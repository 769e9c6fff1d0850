"""Prometheus metrics, fed by events. Closed label sets: no tenant, key or raw path.

Children are bound once and kept: looking labels up costs more than counting.

Where ``PROMETHEUS_MULTIPROC_DIR`` names a folder when this is imported, the library
keeps all figures in files there: any process shows those of all that share the folder,
counters summed up over the dead ones too, gauges of the living as each says (``How``).
With ``keep_by_seat`` a process goes on with the counters of the one before it there, so
that the files do not become more with every restart.

docs/metrics.md explains each name; a test keeps both lists, and whatever else names a
metric, the same.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Literal, TypeVar

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
from prometheus_client.openmetrics import exposition as openmetrics

from gateway.core.admission import Reason
from gateway.core.catalogue import Catalogue, Offer
from gateway.core.events import (
    AttemptFinished,
    BreakerChanged,
    ConfigRead,
    Event,
    FellOver,
    HoldRefused,
    Journaled,
    LeaseExpired,
    PressureChanged,
    RequestFinished,
    RequestShed,
    SharedStateChanged,
    StoreChanged,
    TaskFinished,
    UpstreamChanged,
    WebhookTried,
)
from gateway.core.outcomes import RequestOutcome
from gateway.core.routing import NEXT_BY_KIND, Next
from gateway.core.tasks import STOPPED, DeliveryMode
from gateway.core.traces import trace_id_of
from gateway.ports import Backlog
from providers.kit.contract import FailureKind, Operation, Usage

NANO = 1e9
OPENMETRICS = "application/openmetrics-text"
OTHER = "other"
"""Stands for every label value that is in no closed set."""

LONG_S = (0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300, 450, 600)
"""Pictures take 5 to 300 seconds, queued ones up to 900; the library ends at 10."""
SHORT_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
ANSWER_S = (0.005, 0.025, 0.1, 0.5, 2.5, 10, 60, 300)
STATES = ("closed", "open", "half_open", "paused")
RESULTS = ("success", *(kind.value for kind in FailureKind), STOPPED)
REASONS = tuple(
    kind.value for kind, rule in NEXT_BY_KIND.items() if rule is not Next.NEVER
)
"""Failures after which a task may go on at another upstream."""
LIMITS = ("rate_limit_exceeded", "queue_full", "secret_rotated_too_often")
"""Codes of answers with status 429."""
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
disable_created_metrics()  # type: ignore[no-untyped-call]  # else two series per child
SHARED = values.ValueClass is not values.MutexValue
"""Whether the figures are those of several processes."""
M = TypeVar("M", Counter, Histogram)
How = Literal["livemax", "livemin", "livesum", "livemostrecent"]

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "requests": (
        "Requests for pictures that have ended.",
        ("model", "operation", "mode", "outcome"),
    ),
    "upstream_attempts": ("Calls to upstreams.", ("upstream", "model", "result")),
    "fallbacks": (
        "Times that a task went on at another upstream after a failure.",
        ("model", "from", "to", "reason"),
    ),
    "requests_saved_by_fallback": (
        "Requests delivered after a failed attempt.",
        ("model",),
    ),
    "circuit_transitions": (
        "Times that a circuit moved to a state.",
        ("upstream", "model", "operation", "to"),
    ),
    "tokens": ("Tokens settled.", ("model", "class")),
    "images": ("Pictures delivered.", ("model",)),
    "credits_charged": ("Credits charged.", ("model",)),
    "credits_absorbed": ("Charges beyond hold and balance.", ("model",)),
    "estimated_settlements": ("Settled without reported usage.", ("model",)),
    "holds_refused": ("Requests refused for want of credits.", ("model",)),
    "upstream_cost_usd": (
        "What upstreams charge for pictures that were delivered.",
        ("upstream", "model"),
    ),
    "waste_usd": (
        "What upstreams may charge for calls that delivered nothing.",
        ("upstream", "model"),
    ),
    "cost_comparison_usd": (
        "Cost of the calls whose cost was reported, as reported and as estimated.",
        ("upstream", "model", "source"),
    ),
    "lease_expired": ("Tasks taken over from workers that were lost.", ()),
    "webhook_deliveries": ("Webhooks tried.", ("outcome",)),
    "ratelimited": ("Answers with status 429.", ("code",)),
    "shed": ("Requests refused because too many wait.", ("model", "reason")),
    "journal_entries": ("Kept while the database was away.", ("outcome",)),
    "http_requests": ("HTTP requests answered.", ("route", "method", "status")),
}
HISTOGRAMS: Mapping[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "request_duration_seconds": (
        "Time from a request to its pictures, of those delivered.",
        ("model", "operation", "mode"),
        LONG_S,
    ),
    "overhead_seconds": (
        "Time the gateway itself took for pictures: no upstream, no waiting.",
        (),
        SHORT_S,
    ),
    "upstream_duration_seconds": (
        "Time of a call to an upstream.",
        ("upstream", "model"),
        LONG_S,
    ),
    "http_request_duration_seconds": (
        "Time to answer an HTTP request.",
        ("route",),
        ANSWER_S,
    ),
}
GAUGES: Mapping[str, tuple[str, tuple[str, ...], How]] = {
    "circuit_state": (
        "1 for the state that the circuit is in.",
        ("upstream", "model", "operation", "state"),
        "livemostrecent",
    ),
    "upstream_up": (
        "0 while every circuit of the upstream, or its account's, is open.",
        ("upstream",),
        "livemin",
    ),
    "upstream_drained": (
        "1 while an operator lets nothing new go there.",
        ("upstream",),
        "livemostrecent",
    ),
    "credits_held": ("Credits held for open tasks.", (), "livemostrecent"),
    "ledger_drift_nanocredits": (
        "Sum of all drift that the last audit found; must be 0.",
        (),
        "livemax",
    ),
    "tasks": ("Tasks that are open.", ("state",), "livemostrecent"),
    "task_queue_age_seconds": (
        "Age of the oldest task that no worker has begun.",
        (),
        "livemostrecent",
    ),
    "waiting": ("Sync requests let in without a slot yet.", ("model",), "livesum"),
    "shedding": (
        "1 while new work is refused because of the process itself.",
        ("signal",),
        "livemax",
    ),
    "shared_state_degraded": (
        "1 while each process decides alone because Redis is out of reach.",
        (),
        "livemax",
    ),
    "fleet_processes": (
        "Processes that share the upstreams, as this one sees them.",
        (),
        "livemax",
    ),
    "picture_store_away": (
        "1 while the object store takes no pictures; 0 with pictures on disk.",
        (),
        "livemax",
    ),
    "event_loop_lag_seconds": (
        "How late the event loop is, over the last second.",
        (),
        "livemax",
    ),
    "journal_waiting": (
        "Entries kept on the disk until the database is back.",
        (),
        "livesum",
    ),
    "log_lines_dropped": (
        "Log lines that the sink did not take since the start.",
        (),
        "livesum",
    ),
    "config_last_reload_successful": (
        "0 while an older configuration goes on because the last was refused.",
        (),
        "livemin",
    ),
    "config_last_reload_success_timestamp_seconds": (
        "When the configuration in use was read.",
        (),
        "livemin",
    ),
    "build_info": ("1, labelled with what runs.", ("version", "python"), "livemax"),
}


def keep_by_seat(seat: int) -> None:
    """Keep the figures of this process in the files of its seat, from now on."""
    if SHARED:
        values.ValueClass = values.MultiProcessValue(lambda: seat)  # type: ignore[no-untyped-call]


class Metrics:
    """Counts events; renders what it counted."""

    def __init__(self, version: str = "") -> None:
        self.registry = CollectorRegistry()
        self._sampled: dict[Gauge, Callable[[], float]] = {}
        self._models: set[str] = {OTHER}
        self._circuits: set[tuple[str, str, str]] = set()
        self._told: dict[tuple[str, str, str], str] = {}
        """Where circuits stand, those of offers that are out of the configuration too:
        they may come back."""
        self._upstreams: set[str] = set()
        self._drained: set[str] = set()
        """Those too that are not in the configuration yet: a reload tells first."""
        self._counters: dict[str, Callable[..., Counter]] = {}
        self._histograms: dict[str, Callable[..., Histogram]] = {}
        self._gauges: dict[str, Gauge] = {}
        for name, (doc, labels) in COUNTERS.items():
            counter = Counter(f"imageway_{name}", doc, labels, registry=self.registry)
            self._counters[name] = _children(counter, labels)
        for name, (doc, labels, buckets) in HISTOGRAMS.items():
            histogram = Histogram(
                f"imageway_{name}", doc, labels, registry=self.registry, buckets=buckets
            )
            self._histograms[name] = _children(histogram, labels)
        for name, (doc, labels, how) in GAUGES.items():
            self._gauges[name] = Gauge(
                f"imageway_{name}",
                doc,
                labels,
                registry=self.registry,
                multiprocess_mode=how,
            )
        self._state = cache(self._gauges["circuit_state"].labels)
        self._gauges["build_info"].labels(version, platform.python_version()).set(1)
        self._gauges["config_last_reload_successful"].set(1)
        self._gauges[
            "config_last_reload_success_timestamp_seconds"
        ].set_to_current_time()
        self._gauges["fleet_processes"].set(1)
        self._preset()

    def _preset(self) -> None:
        # What is configured nowhere; ``known`` has the rest.
        for outcome in ("delivered", "retry", "failed"):
            self._counters["webhook_deliveries"](outcome)
        for code in (*LIMITS, OTHER):
            self._counters["ratelimited"](code)
        for outcome in ("kept", "booked", "never_begun", "taken_over", "too_late"):
            self._counters["journal_entries"](outcome)
        for reason in Reason:
            self._counters["shed"]("any", reason.value)
            if reason.by_process and reason is not Reason.IN_FLIGHT:
                self._gauges["shedding"].labels(reason.value)
        for state in ("pending", "processing"):
            self._gauges["tasks"].labels(state)

    def known(self, catalogue: Catalogue) -> None:
        """Show every variant, upstream and offer from the start, at zero.

        Of those that were known before and are not among them no state is shown.
        """
        offers = [offer for each in catalogue.offers.values() for offer in each]
        self._forget_states(offers)
        for variant in (*catalogue.variants, OTHER):
            self._models.add(variant)
            self._preset_variant(variant)
        for offer in offers:
            self._preset_offer(offer)
        for variant, each in catalogue.offers.items():
            names = {offer.upstream for offer in each}
            pairs = ((a, b) for a in names for b in names if a != b)
            for pair in pairs:
                for reason in REASONS:
                    self._counters["fallbacks"](variant, *pair, reason)

    def show_upstreams(self, up: Mapping[str, bool]) -> None:
        """Show which upstreams can be called."""
        for upstream, is_up in up.items():
            if upstream in self._upstreams:
                self._gauges["upstream_up"].labels(upstream).set(is_up)

    def show_backlog(self, backlog: Backlog, now_ms: int) -> None:
        """Show what the books say of open tasks."""
        states = {"pending": backlog.pending, "processing": backlog.processing}
        for state, count in states.items():
            self._gauges["tasks"].labels(state).set(count)
        since_ms = backlog.oldest_queued_ms
        age_ms = 0 if since_ms is None else max(0, now_ms - since_ms)
        self._gauges["task_queue_age_seconds"].set(age_ms / 1000)
        self._gauges["credits_held"].set(backlog.held_nanocredits / NANO)

    def show_drift(self, nanocredits: int) -> None:
        """Show what the last audit found."""
        self._gauges["ledger_drift_nanocredits"].set(nanocredits)

    def watch(self, name: str, value: Callable[[], float]) -> None:
        """Look at a gauge without labels whenever it is shown."""
        self._sampled[self._gauges[name]] = value

    def watch_waiting(
        self,
        variants: Iterable[str],
        waiting: Callable[[str], int],
        lag_ms: Callable[[], float],
    ) -> None:
        """Show who waits for a slot, and how late the event loop is."""
        for variant in variants:
            gauge = self._gauges["waiting"].labels(variant)
            self._sampled[gauge] = partial(waiting, variant)
        self.watch("event_loop_lag_seconds", lambda: lag_ms() / 1000)

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
            case FellOver() | LeaseExpired() | HoldRefused() | RequestShed():
                self._on_trouble(event)
            case UpstreamChanged() | SharedStateChanged() | StoreChanged():
                self._on_change(event)
            case WebhookTried() | ConfigRead() | PressureChanged() | Journaled():
                self._on_other(event)

    async def sample(self) -> None:
        """Set what is looked at rather than told of; for what others show of it."""
        for gauge, value in self._sampled.items():
            gauge.set(value())

    async def render(self, accept: str = "") -> tuple[bytes, str]:
        """Write all metrics, in the format asked for; with its media type.

        In OpenMetrics with exemplars: traces of tasks. The library has none for
        several processes, so that these always get Prometheus' own text format.
        """
        await self.sample()
        registry = self.registry
        if OPENMETRICS in accept and not SHARED:
            text = await asyncio.to_thread(openmetrics.generate_latest, registry)
            return text, openmetrics.CONTENT_TYPE_LATEST
        if SHARED:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        text = await asyncio.to_thread(generate_latest, registry)
        return text, CONTENT_TYPE_LATEST

    # --- presets ---

    def _preset_variant(self, variant: str) -> None:
        for operation in Operation:
            for mode in DeliveryMode:
                for outcome in RequestOutcome:
                    labels = operation.value, mode.value, outcome.value
                    self._counters["requests"](variant, *labels)
        if variant == OTHER:
            return
        for name in (
            "requests_saved_by_fallback",
            "images",
            "credits_charged",
            "credits_absorbed",
            "estimated_settlements",
            "holds_refused",
        ):
            self._counters[name](variant)
        for token_class in Usage.__slots__:
            self._counters["tokens"](variant, token_class)
        for reason in Reason:
            self._counters["shed"](variant, reason.value)

    def _preset_offer(self, offer: Offer) -> None:
        upstream, variant = offer.upstream, offer.variant
        if upstream not in self._upstreams:
            self._preset_upstream(upstream)
        for result in RESULTS:
            self._counters["upstream_attempts"](upstream, variant, result)
        for name in ("upstream_cost_usd", "waste_usd"):
            self._counters[name](upstream, variant)
        for source in ("reported", "estimated"):
            self._counters["cost_comparison_usd"](upstream, variant, source)
        for operation in offer.capabilities.operations:
            circuit = upstream, variant, operation.value
            if circuit not in self._circuits:
                self._circuits.add(circuit)
                self._show_state(circuit, self._told.get(circuit, "closed"))
            for state in STATES:
                self._counters["circuit_transitions"](*circuit, state)

    def _preset_upstream(self, upstream: str) -> None:
        self._upstreams.add(upstream)
        self._gauges["upstream_up"].labels(upstream).set(1)
        drained = self._gauges["upstream_drained"].labels(upstream)
        if upstream in self._drained:  # else others may know it better
            drained.set(1)

    def _forget_states(self, offers: Iterable[Offer]) -> None:
        kept = {(offer.upstream, offer.variant) for offer in offers}
        upstreams = {upstream for upstream, _ in kept}
        gone = {circuit for circuit in self._circuits if circuit[:2] not in kept}
        for circuit in gone:
            for each in STATES:
                self._state(*circuit, each).set(0)  # what others show of it stays
                _take_out(self._gauges["circuit_state"], *circuit, each)
        for upstream in self._upstreams - upstreams:
            for name, well in (("upstream_up", 1), ("upstream_drained", 0)):
                self._gauges[name].labels(upstream).set(well)
                _take_out(self._gauges[name], upstream)
        self._circuits -= gone
        self._upstreams &= upstreams
        if gone:
            self._state = cache(self._gauges["circuit_state"].labels)

    # --- events ---

    def _on_request(self, event: RequestFinished) -> None:
        count = self._counters
        method = event.method if event.method in METHODS else OTHER
        count["http_requests"](event.route, method, str(event.status)).inc()
        answered = self._histograms["http_request_duration_seconds"](event.route)
        answered.observe(event.duration_ms / 1000)
        if event.status == 429:  # noqa: PLR2004
            code = event.error_code
            count["ratelimited"](code if code in LIMITS else OTHER).inc()
        asked = event.asked
        if asked is not None and event.outcome is not None:
            model = self._model(asked.variant or OTHER)
            labels = asked.operation, asked.mode, event.outcome
            count["requests"](model, *labels).inc()

    def _on_attempt(self, event: AttemptFinished) -> None:
        count, offer = self._counters, (event.upstream, event.variant)
        won = event.outcome == "done"
        result = "success" if won else event.outcome
        count["upstream_attempts"](*offer, result).inc()
        took = self._histograms["upstream_duration_seconds"](*offer)
        took.observe(event.duration_ms / 1000, _exemplar(event.task_id))
        if event.cost_nanousd:
            name = "upstream_cost_usd" if won else "waste_usd"
            count[name](*offer).inc(event.cost_nanousd / NANO)
        if event.estimate_nanousd:
            compared = count["cost_comparison_usd"]
            compared(*offer, "reported").inc(event.cost_nanousd / NANO)
            compared(*offer, "estimated").inc(event.estimate_nanousd / NANO)

    def _on_task(self, event: TaskFinished) -> None:
        count, model = self._counters, self._model(event.variant)
        kind = event.operation, event.mode
        count["requests"](model, *kind, event.outcome).inc()
        if event.overhead_ms is not None:
            self._histograms["overhead_seconds"]().observe(event.overhead_ms / 1000)
        if event.saved_by_fallback:
            count["requests_saved_by_fallback"](model).inc()
        if event.images:
            took = self._histograms["request_duration_seconds"](model, *kind)
            took.observe(event.duration_ms / 1000, _exemplar(event.task_id))
            count["images"](model).inc(event.images)
        self._on_settlement(event, model)

    def _on_settlement(self, event: TaskFinished, model: str) -> None:
        count, usage = self._counters, event.usage
        if usage is None:
            return
        count["credits_charged"](model).inc(event.charged_nanocredits / NANO)
        count["credits_absorbed"](model).inc(event.absorbed_nanocredits / NANO)
        if event.usage_source == "estimated":
            count["estimated_settlements"](model).inc()
        for token_class in Usage.__slots__:
            tokens = getattr(usage, token_class)
            if tokens:
                count["tokens"](model, token_class).inc(tokens)

    def _on_breaker(self, event: BreakerChanged) -> None:
        variant = event.offer_id.partition("/")[2]
        circuit = event.upstream, variant, event.operation
        self._told[circuit] = event.state
        # A call may end after its offer was taken out of the configuration.
        if circuit in self._circuits:
            self._show_state(circuit, event.state)
            self._counters["circuit_transitions"](*circuit, event.state).inc()

    def _on_trouble(
        self, event: FellOver | LeaseExpired | HoldRefused | RequestShed
    ) -> None:
        match event:
            case FellOver():
                way = event.from_upstream, event.to_upstream
                self._counters["fallbacks"](event.variant, *way, event.reason).inc()
            case LeaseExpired():
                self._counters["lease_expired"]().inc()
            case HoldRefused():
                self._counters["holds_refused"](event.variant).inc()
            case RequestShed():
                self._counters["shed"](event.variant, event.reason).inc()

    def _on_change(
        self, event: UpstreamChanged | SharedStateChanged | StoreChanged
    ) -> None:
        match event:
            case SharedStateChanged():
                self._gauges["shared_state_degraded"].set(event.degraded)
            case StoreChanged():
                self._gauges["picture_store_away"].set(event.state == "away")
            case UpstreamChanged():
                self._on_drain(event)

    def _on_drain(self, event: UpstreamChanged) -> None:
        if event.change == "reset":
            return
        drained = event.change == "drained"
        change = self._drained.add if drained else self._drained.discard
        change(event.upstream)
        if event.upstream in self._upstreams:
            self._gauges["upstream_drained"].labels(event.upstream).set(drained)

    def _on_other(
        self, event: WebhookTried | ConfigRead | PressureChanged | Journaled
    ) -> None:
        match event:
            case WebhookTried():
                self._counters["webhook_deliveries"](event.outcome).inc()
            case PressureChanged():
                self._gauges["shedding"].labels(event.signal).set(event.on)
            case Journaled():
                self._counters["journal_entries"](event.outcome).inc()
            case ConfigRead():
                ok = event.outcome != "refused"
                self._gauges["config_last_reload_successful"].set(ok)
                if event.outcome == "reloaded":
                    read = "config_last_reload_success_timestamp_seconds"
                    self._gauges[read].set_to_current_time()

    def _model(self, name: str) -> str:
        return name if name in self._models else OTHER

    def _show_state(self, circuit: tuple[str, str, str], state: str) -> None:
        for each in STATES:
            self._state(*circuit, each).set(each == state)


def _exemplar(task_id: str) -> dict[str, str]:
    return {"trace_id": trace_id_of(task_id)}


def _children(metric: M, labels: tuple[str, ...]) -> Callable[..., M]:
    # One without labels is its own only child.
    return cache(metric.labels) if labels else lambda: metric


def _take_out(gauge: Gauge, *labels: str) -> None:
    if not SHARED:  # there the library cannot
        gauge.remove(*labels)


def forget_process(folder: Path, seat: int) -> None:
    """Take the gauges of a process that has ended out of a folder of figures."""
    multiprocess.mark_process_dead(seat, str(folder))  # type: ignore[no-untyped-call]
