"""Writes the dashboards: ``python -m grafana.build``; ``--check`` only compares.

They are made by code so that panels look alike and queries are said once; the JSON is
what Grafana loads, and is committed. Every query goes to the data source
``prometheus`` of provisioning/. Gauges of the books say the same in every process:
``max``, not ``sum``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus
from grafana_foundation_sdk.builders import stat as stats
from grafana_foundation_sdk.builders import timeseries as series
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
)

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
COLUMNS = 24
RATE = "$__rate_interval"


@dataclass(frozen=True)
class Query:
    """One line, or one for each set of labels that ``legend`` names."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """A graph; with ``steps`` (value, colour) a single number instead."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    about: str = ""
    width: int = 8
    stacked: bool = False
    steps: Sequence[tuple[float | None, str]] = ()


@dataclass(frozen=True)
class Board:
    """A dashboard: rows of panels under their titles."""

    uid: str
    title: str
    rows: Sequence[tuple[str, Sequence[Panel]]]


def rate(name: str, by: str, where: str = "") -> str:
    """Write the sum of the rates of a counter."""
    return f"sum by ({by}) (rate({name}{where}[{RATE}]))"


def quantile(share: float, name: str, by: str) -> str:
    """Write a quantile of a histogram."""
    buckets = f"sum by (le, {by}) (rate({name}_bucket[{RATE}]))"
    return f"histogram_quantile({share}, {buckets})"


REQUESTS = "imageway_requests_total"
ATTEMPTS = "imageway_upstream_attempts_total"
GOOD = ((None, "red"), (0.995, "orange"), (0.999, "green"))
ZERO = ((None, "green"), (1, "red"))

OVERVIEW = Board(
    "imageway-overview",
    "imageway: overview",
    [
        (
            "Objective: 99.9 % over 30 days",
            [
                Panel(
                    "Availability, 30 days",
                    [Query("1 - imageway:errors:ratio30d", "{{model}}")],
                    "percentunit",
                    "Success and refusals over all but client errors and cancelled.",
                    steps=GOOD,
                ),
                Panel(
                    "Error budget left, 30 days",
                    [Query("imageway:error_budget:left30d", "{{model}}")],
                    "percentunit",
                    "Below 0 it is overspent.",
                    steps=((None, "red"), (0, "orange"), (0.25, "green")),
                ),
                Panel(
                    "Availability, last hour",
                    [Query("1 - imageway:errors:ratio1h", "{{model}}")],
                    "percentunit",
                    steps=GOOD,
                ),
                Panel(
                    "Burn rate",
                    [
                        Query("imageway:errors:ratio5m / 0.001", "{{model}} 5m"),
                        Query("imageway:errors:ratio1h / 0.001", "{{model}} 1h"),
                        Query("imageway:errors:ratio6h / 0.001", "{{model}} 6h"),
                    ],
                    about="14.4 over 1 h, or 6 over 6 h, pages.",
                    width=12,
                ),
                Panel(
                    "Alerts",
                    [
                        Query(
                            "count by (alertname, severity) "
                            '(ALERTS{alertstate="firing"}) or vector(0)',
                            "{{alertname}} {{severity}}",
                        )
                    ],
                    about="docs/runbook.md has a section for each.",
                    width=12,
                ),
            ],
        ),
        (
            "Requests",
            [
                Panel(
                    "Requests by outcome",
                    [Query(rate(REQUESTS, "outcome"), "{{outcome}}")],
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Failures by model",
                    [
                        Query(
                            rate(
                                REQUESTS,
                                "model, outcome",
                                '{outcome=~"upstream_exhausted|timeout|gateway_error"}',
                            ),
                            "{{model}} {{outcome}}",
                        )
                    ],
                    "reqps",
                ),
                Panel(
                    "Saved by falling over",
                    [
                        Query(
                            rate("imageway_requests_saved_by_fallback_total", "model"),
                            "{{model}}",
                        )
                    ],
                    "reqps",
                    "Delivered although an upstream had failed.",
                ),
                Panel(
                    "Time to pictures",
                    [
                        Query(
                            quantile(
                                share, "imageway_request_duration_seconds", "mode"
                            ),
                            f"p{share * 100:.0f} {{{{mode}}}}",
                        )
                        for share in (0.5, 0.95)
                    ],
                    "s",
                ),
                Panel(
                    "Overhead of the gateway",
                    [
                        Query(
                            f"histogram_quantile({share}, sum by (le) "
                            f"(rate(imageway_overhead_seconds_bucket[{RATE}])))",
                            f"p{share * 100:.0f}",
                        )
                        for share in (0.5, 0.95, 0.99)
                    ],
                    "s",
                    "Neither upstreams nor waiting for a slot.",
                ),
                Panel(
                    "Refused before any work",
                    [
                        Query(
                            rate("imageway_shed_total", "reason"),
                            "too many: {{reason}}",
                        ),
                        Query(
                            rate("imageway_ratelimited_total", "code"), "429 {{code}}"
                        ),
                        Query(
                            f"sum(rate(imageway_holds_refused_total[{RATE}]))",
                            "402 no credits",
                        ),
                    ],
                    "reqps",
                ),
            ],
        ),
    ],
)

UPSTREAMS = Board(
    "imageway-upstreams",
    "imageway: upstreams",
    [
        (
            "Now",
            [
                Panel(
                    "Up",
                    [Query("min by (upstream) (imageway_upstream_up)", "{{upstream}}")],
                    about="0 while no call is let to it.",
                    steps=((None, "red"), (1, "green")),
                ),
                Panel(
                    "Drained",
                    [
                        Query(
                            "max by (upstream) (imageway_upstream_drained)",
                            "{{upstream}}",
                        )
                    ],
                    about="1 while an operator lets nothing new go there.",
                    steps=((None, "green"), (1, "orange")),
                ),
                Panel(
                    "Availability, 30 days",
                    [Query("1 - imageway:upstream_errors:ratio30d", "{{upstream}}")],
                    "percentunit",
                    "Of calls, whatever became of the requests.",
                    steps=((None, "red"), (0.95, "orange"), (0.99, "green")),
                ),
                Panel(
                    "Circuits that are not closed",
                    [
                        Query(
                            "max by (upstream, model, operation, state) "
                            '(imageway_circuit_state{state!="closed"})',
                            "{{upstream}} {{model}} {{operation}} {{state}}",
                        )
                    ],
                    width=12,
                ),
                Panel(
                    "Circuits opened",
                    [
                        Query(
                            "sum by (upstream) (increase("
                            'imageway_circuit_transitions_total{to="open"}[1h]))',
                            "{{upstream}}",
                        )
                    ],
                    about="In the hour before.",
                    width=12,
                ),
            ],
        ),
        (
            "Calls",
            [
                Panel(
                    "Failed share",
                    [
                        Query("imageway:upstream_errors:ratio5m", "{{upstream}} 5m"),
                        Query("imageway:upstream_errors:ratio1h", "{{upstream}} 1h"),
                    ],
                    "percentunit",
                ),
                Panel(
                    "Calls",
                    [Query(rate(ATTEMPTS, "upstream"), "{{upstream}}")],
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Failures by kind",
                    [
                        Query(
                            rate(ATTEMPTS, "upstream, result", '{result!="success"}')
                            + " > 0 or vector(0)",
                            "{{upstream}} {{result}}",
                        )
                    ],
                    "reqps",
                ),
                Panel(
                    "Time of a call",
                    [
                        Query(
                            quantile(
                                share, "imageway_upstream_duration_seconds", "upstream"
                            ),
                            f"p{share * 100:.0f} {{{{upstream}}}}",
                        )
                        for share in (0.5, 0.95)
                    ],
                    "s",
                ),
                Panel(
                    "Fell over",
                    [
                        Query(
                            rate("imageway_fallbacks_total", "from, to, reason")
                            + " > 0 or vector(0)",
                            "{{from}} to {{to}}: {{reason}}",
                        )
                    ],
                    "reqps",
                ),
                Panel(
                    "Waiting for a slot",
                    [Query("sum by (model) (imageway_waiting)", "{{model}}")],
                    about="Sync requests.",
                ),
            ],
        ),
    ],
)

BILLING = Board(
    "imageway-billing",
    "imageway: billing",
    [
        (
            "Sold",
            [
                Panel(
                    "Ledger drift",
                    [Query("max(imageway_ledger_drift_nanocredits)")],
                    about="Nano-credits; anything but 0 pages.",
                    width=6,
                    steps=ZERO,
                ),
                Panel(
                    "Credits held",
                    [Query("max(imageway_credits_held)")],
                    width=6,
                    steps=((None, "blue"),),
                ),
                Panel(
                    "Credits charged, 24 h",
                    [Query("sum(increase(imageway_credits_charged_total[24h]))")],
                    width=6,
                    steps=((None, "blue"),),
                ),
                Panel(
                    "Credits absorbed, 24 h",
                    [Query("sum(increase(imageway_credits_absorbed_total[24h]))")],
                    about="Beyond hold and balance: the operator's loss.",
                    width=6,
                    steps=((None, "green"), (1, "orange")),
                ),
                Panel(
                    "Credits charged per hour",
                    [
                        Query(
                            f"{rate('imageway_credits_charged_total', 'model')} * 3600",
                            "{{model}}",
                        )
                    ],
                    stacked=True,
                ),
                Panel(
                    "Pictures per hour",
                    [
                        Query(
                            f"{rate('imageway_images_total', 'model')} * 3600",
                            "{{model}}",
                        )
                    ],
                    stacked=True,
                ),
                Panel(
                    "Tokens per second",
                    [Query(rate("imageway_tokens_total", "class"), "{{class}}")],
                    stacked=True,
                ),
            ],
        ),
        (
            "Bought",
            [
                Panel(
                    "Upstream cost per hour",
                    [
                        Query(
                            f"{rate('imageway_upstream_cost_usd_total', 'upstream')}"
                            " * 3600",
                            "{{upstream}}",
                        )
                    ],
                    "currencyUSD",
                    stacked=True,
                ),
                Panel(
                    "Waste per hour",
                    [
                        Query(
                            f"{rate('imageway_waste_usd_total', 'upstream')} * 3600",
                            "{{upstream}}",
                        )
                    ],
                    "currencyUSD",
                    "What may have been charged for calls that delivered nothing.",
                ),
                Panel(
                    "Reported over estimated cost",
                    [
                        Query(
                            "sum by (upstream) (increase("
                            "imageway_cost_comparison_usd_total"
                            '{source="reported"}[6h])) / sum by (upstream) (increase('
                            "imageway_cost_comparison_usd_total"
                            '{source="estimated"}[6h]))',
                            "{{upstream}}",
                        )
                    ],
                    "percentunit",
                    "1 where the card in the config is right.",
                ),
                Panel(
                    "Charged by the estimate",
                    [
                        Query(
                            rate("imageway_estimated_settlements_total", "model"),
                            "{{model}}",
                        )
                    ],
                    "reqps",
                    "No usage was reported.",
                ),
            ],
        ),
    ],
)

RUNTIME = Board(
    "imageway-runtime",
    "imageway: tasks and runtime",
    [
        (
            "Tasks",
            [
                Panel(
                    "Open tasks",
                    [Query("max by (state) (imageway_tasks)", "{{state}}")],
                ),
                Panel(
                    "Age of the oldest in the queue",
                    [Query("max(imageway_task_queue_age_seconds)", "age")],
                    "s",
                    "Tasks end after 900 s.",
                ),
                Panel(
                    "Taken over from lost workers",
                    [Query("sum(increase(imageway_lease_expired_total[1h]))", "1 h")],
                ),
                Panel(
                    "Webhooks",
                    [
                        Query(
                            rate("imageway_webhook_deliveries_total", "outcome"),
                            "{{outcome}}",
                        )
                    ],
                    "reqps",
                ),
                Panel(
                    "Kept for the database",
                    [
                        Query("sum(imageway_journal_waiting)", "waiting"),
                        Query(
                            rate("imageway_journal_entries_total", "outcome"),
                            "{{outcome}} per s",
                        ),
                    ],
                ),
                Panel(
                    "HTTP answers",
                    [
                        Query(
                            rate("imageway_http_requests_total", "status"), "{{status}}"
                        )
                    ],
                    "reqps",
                    stacked=True,
                ),
            ],
        ),
        (
            "Processes",
            [
                Panel(
                    "Up",
                    [Query('up{job="imageway"}', "{{instance}}")],
                    steps=((None, "red"), (1, "green")),
                ),
                Panel(
                    "Version",
                    [
                        Query(
                            "count by (version, python) (imageway_build_info)",
                            "{{version}}, Python {{python}}",
                        )
                    ],
                    steps=((None, "blue"),),
                ),
                Panel(
                    "Configuration",
                    [
                        Query(
                            "min by (instance) "
                            "(imageway_config_last_reload_successful)",
                            "{{instance}}",
                        )
                    ],
                    about="0: what is on the disk was refused.",
                    steps=((None, "red"), (1, "green")),
                ),
                Panel(
                    "Configuration in use since",
                    [
                        Query(
                            "time() - "
                            "imageway_config_last_reload_success_timestamp_seconds",
                            "{{instance}}",
                        )
                    ],
                    "s",
                ),
                Panel(
                    "Event loop lag",
                    [Query("imageway_event_loop_lag_seconds", "{{instance}}")],
                    "s",
                ),
                Panel(
                    "Refusing new work",
                    [Query("max by (signal) (imageway_shedding)", "{{signal}}")],
                ),
                Panel(
                    "Stores out of reach",
                    [
                        Query("max(imageway_shared_state_degraded)", "Redis"),
                        Query("max(imageway_picture_store_away)", "pictures"),
                    ],
                ),
                Panel(
                    "Processes in the fleet",
                    [Query("max(imageway_fleet_processes)", "seen")],
                ),
                Panel(
                    "Log lines lost",
                    [Query("sum(imageway_log_lines_dropped)", "lines")],
                ),
                Panel(
                    "Slowest routes, p95",
                    [
                        Query(
                            "topk(5, "
                            + quantile(
                                0.95, "imageway_http_request_duration_seconds", "route"
                            )
                            + ")",
                            "{{route}}",
                        )
                    ],
                    "s",
                    width=24,
                ),
            ],
        ),
    ],
)

BOARDS = (OVERVIEW, UPSTREAMS, BILLING, RUNTIME)


def text_of(board: Board) -> str:
    """Write a dashboard as Grafana reads it."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .tags(["imageway"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .link(
            dashboard.DashboardLink("imageway")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["imageway"])
            .keep_time(True)
        )
    )
    ids = count(1)
    for title, panels in board.rows:
        made = made.with_row(dashboard.Row(title).id(next(ids)))
        for panel in panels:
            drawn = _number(panel) if panel.steps else _graph(panel)
            made = made.with_panel(drawn.id(next(ids)))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _targets(panel: Panel) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery()
        .expr(query.expr)
        .legend_format(query.legend or "__auto")
        .ref_id(chr(ord("A") + place))
        for place, query in enumerate(panel.queries)
    ]


def _graph(panel: Panel) -> series.Panel:
    legend = (
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    tooltip = (
        common.VizTooltipOptions()
        .mode(TooltipDisplayMode.MULTI)
        .sort(SortOrder.DESCENDING)
    )
    made = (
        series.Panel()
        .title(panel.title)
        .description(panel.about)
        .datasource(SOURCE)
        .unit(panel.unit)
        .min(0)
        .draw_style(GraphDrawStyle.LINE)
        .fill_opacity(30 if panel.stacked else 0)
        .span(panel.width)
        .height(8)
        .legend(legend)
        .tooltip(tooltip)
    )
    if panel.stacked:
        made = made.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for target in _targets(panel):
        made = made.with_target(target)
    return made


def _number(panel: Panel) -> stats.Panel:
    steps = [Threshold(value=value, color=colour) for value, colour in panel.steps]
    made = (
        stats.Panel()
        .title(panel.title)
        .description(panel.about)
        .datasource(SOURCE)
        .unit(panel.unit)
        .span(panel.width)
        .height(5)
        .color_mode(BigValueColorMode.BACKGROUND)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(
            dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
        )
    )
    for target in _targets(panel):
        made = made.with_target(target.instant())
    return made


def main(arguments: Sequence[str]) -> int:
    """Write all dashboards, or say which differ from what is committed."""
    wanted = {FOLDER / f"{board.uid}.json": text_of(board) for board in BOARDS}
    if "--check" not in arguments:
        for path, text in wanted.items():
            path.write_text(text)
        return 0
    differ = [p.name for p, text in wanted.items() if p.read_text() != text]
    differ += [p.name for p in FOLDER.glob("*.json") if p not in wanted]
    if differ:
        print(f"run python -m grafana.build: {', '.join(differ)}", file=sys.stderr)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
