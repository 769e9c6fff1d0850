"""``/status``: what is up and what was, for people and for feed readers, without a key.

Written by the server: no script, nothing from another host, and a content policy that
allows neither. Names of upstreams are there only where tenants may know them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.types import Scope

from gateway.api.http import AnyRequest
from gateway.core.errors import NotFoundError
from gateway.core.uptime import (
    FAIR_MILLIONTHS,
    GOAL_MILLIONTHS,
    KEPT_DAYS,
    WINDOWS_MS,
    Count,
    Incident,
    Kind,
    State,
    Uptime,
    day_of,
    slot_of,
)
from gateway.flows.uptime import ReadUptime, Report

INCIDENTS_SHOWN = 20
FEED_MAX_INCIDENTS = 50
FRESH_S = 15
BAR_PX, GAP_PX, BARS_PX = 6, 2, 28
BADGE_DAYS = "30d"
_WORDS = {
    State.UP: "up",
    State.DEGRADED: "degraded",
    State.DOWN: "down",
    State.UNKNOWN: "no requests lately",
}
STYLE = """
:root{--bg:#fff;--fg:#1b1f24;--dim:#5c6570;--line:#d9dee4;--card:#f6f8fa;
--up:#1a7f37;--fair:#9a6700;--bad:#cf222e;--none:#c4cbd3}
@media(prefers-color-scheme:dark){:root{--bg:#0f1317;--fg:#e6eaee;--dim:#98a3ae;
--line:#2b323a;--card:#161b21;--up:#3fb950;--fair:#d29922;--bad:#f85149;--none:#3a434d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
main{max-width:52rem;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.6rem;margin:0 0 1rem}h2{font-size:1.15rem;margin:2.5rem 0 .75rem}
p{margin:.25rem 0}a{color:inherit}
.dim{color:var(--dim);font-size:.875rem}
.now{padding:.9rem 1.1rem;border-radius:.6rem;border:1px solid var(--line);
background:var(--card);font-weight:600;border-left:.4rem solid var(--none)}
.now.up{border-left-color:var(--up)}.now.degraded{border-left-color:var(--fair)}
.now.down{border-left-color:var(--bad)}
section.one{border-top:1px solid var(--line);padding:1rem 0}
.head{display:flex;justify-content:space-between;gap:1rem;flex-wrap:wrap}
.head h3{margin:0;font-size:1rem;overflow-wrap:anywhere}
.up>b,.state.up{color:var(--up)}.state.degraded{color:var(--fair)}
.state.down{color:var(--bad)}.state.unknown{color:var(--dim)}.state{font-weight:600}
svg.bars{display:block;width:100%;height:1.75rem;margin:.5rem 0}
.b-up{fill:var(--up)}.b-fair{fill:var(--fair)}.b-bad{fill:var(--bad)}
.b-none{fill:var(--none)}
dl{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;margin:0}
dl div{display:flex;gap:.4rem}dt{color:var(--dim)}
dd{margin:0;font-variant-numeric:tabular-nums}
li{margin:.4rem 0}ul{padding-left:1.2rem}
"""
_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def status_routes(
    read: ReadUptime, origin: Callable[[Scope], str]
) -> list[HTTPRouteHandler]:
    """Route the status page and what is made of the same report."""

    @get("/status")
    async def status_page() -> Response[bytes]:
        """Show what is up and what was."""
        return _answer(page_of(await read()), "text/html; charset=utf-8")

    @get("/status.json")
    async def status_json() -> Response[bytes]:
        """Tell the same to programs."""
        body = msgspec.json.encode(facts_of(await read()))
        return _answer(body, "application/json")

    @get("/status/badge.svg")
    async def badge(request: AnyRequest) -> Response[bytes]:
        """Draw the uptime of 30 days: of ``?model=`` or of all models together."""
        report, name = await read(), request.query_params.get("model")
        models = [m for m in report.models if name in {None, m.subject[1]}]
        if not models:
            raise NotFoundError("There is no such model.", code="model_not_found")
        return _answer(badge_of(models), "image/svg+xml")

    @get("/status/feed.atom")
    async def feed(request: AnyRequest) -> Response[bytes]:
        """List the incidents as a feed."""
        body = feed_of(await read(), origin(request.scope))
        return _answer(body, "application/atom+xml; charset=utf-8")

    return [status_page, status_json, badge, feed]


def facts_of(report: Report) -> dict[str, object]:
    """Put a report into the words of ``/status.json``."""
    return {
        "object": "status",
        "state": overall(report).value,
        "at_ms": report.at_ms,
        "models": [_uptime(each) for each in report.models],
        "upstreams": [_uptime(each) for each in report.upstreams],
        "incidents": [_incident(each) for each in report.incidents],
    }


def overall(report: Report) -> State:
    """Say in one word how the models are: as bad as the worst of them."""
    states = {each.state for each in report.models}
    for state in (State.DOWN, State.DEGRADED, State.UP):
        if state in states:
            return state
    return State.UNKNOWN


def page_of(report: Report) -> bytes:
    """Write the page."""
    state = overall(report)
    told = {
        State.UP: "All models are up",
        State.DEGRADED: "Some requests fail",
        State.DOWN: "A model is down",
        State.UNKNOWN: "Nobody asked for a picture lately",
    }[state]
    parts = [
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            "<title>Status</title>"
            '<link rel="alternate" type="application/atom+xml" '
            'href="/status/feed.atom">'
            f"<style>{STYLE}</style></head><body><main><h1>Status</h1>"
            f'<p class="now {state.value}" role="status">{told}</p>'
            f'<p class="dim">As of {_time(report.at_ms)}. '
            '<a href="/status.json">JSON</a> · <a href="/status/feed.atom">Feed</a></p>'
        )
    ]
    for title, subjects in (
        ("Models", report.models),
        ("Upstreams", report.upstreams),
    ):
        if subjects:
            parts.append(f"<h2>{title}</h2>")
            parts += [_section(each, report.at_ms) for each in subjects]
    parts += [_incidents(report.incidents), "</main></body></html>\n"]
    return "".join(parts).encode()


def badge_of(models: Sequence[Uptime]) -> bytes:
    """Draw a badge: grey and words on the left, colour and share on the right."""
    total = Count()
    for model in models:
        total = total.plus(model.windows[BADGE_DAYS])
    text, share = "uptime 30 d", percent(total)
    colours = {"up": "#1a7f37", "fair": "#9a6700", "bad": "#cf222e", "none": "#6e7781"}
    left_px, right_px = 84, 14 + 7 * len(share)
    width_px = left_px + right_px
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width_px}" height="20" '
        f'role="img" aria-label="{text}: {share}"><title>{text}: {share}</title>'
        f'<rect width="{left_px}" height="20" fill="#444c56"/>'
        f'<rect x="{left_px}" width="{right_px}" height="20" '
        f'fill="{colours[_grade(total)]}"/>'
        '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" '
        'text-anchor="middle">'
        f'<text x="{left_px / 2}" y="14">{text}</text>'
        f'<text x="{left_px + right_px / 2}" y="14">{share}</text></g></svg>\n'
    ).encode()


def feed_of(report: Report, origin: str) -> bytes:
    """Write the incidents as an Atom feed, the latest first."""
    link = escape(f"{origin}/status")
    shown = report.incidents[:FEED_MAX_INCIDENTS]
    # What lasts is news once a slot, not each time that somebody looks.
    lately_ms = slot_of(report.at_ms)
    ends = [each.until_ms or lately_ms for each in shown]
    parts = [
        (
            '<?xml version="1.0" encoding="utf-8"?>\n'
            '<feed xmlns="http://www.w3.org/2005/Atom"><title>Incidents</title>'
            f"<id>{link}</id><author><name>imageway</name></author>"
            f'<link href="{link}"/><link rel="self" href="{link}/feed.atom"/>'
            f"<updated>{_stamp(max(ends, default=lately_ms))}</updated>"
        )
    ]
    for each in shown:
        kind, name = each.subject
        mark = escape(f"{kind.value}/{name}/{each.since_ms}")
        parts.append(
            f"<entry><id>{link}#{mark}</id><title>{escape(_headline(each))}</title>"
            f'<link href="{link}"/>'
            f"<published>{_stamp(each.since_ms)}</published>"
            f"<updated>{_stamp(each.until_ms or lately_ms)}</updated>"
            f'<content type="text">{escape(_story(each))}</content></entry>'
        )
    return ("".join(parts) + "</feed>\n").encode()


def percent(count: Count) -> str:
    """Write a share with as many places as 99.9 % over 90 days needs; rounded down."""
    millionths = count.millionths
    if millionths is None:
        return "no data"
    if millionths == 1_000_000:  # noqa: PLR2004
        return "100 %"
    return f"{millionths // 10_000}.{millionths % 10_000 // 10:03d} %"


def _section(one: Uptime, at_ms: int) -> str:
    name, state = escape(one.subject[1]), one.state
    shares = "".join(
        f"<div><dt>{window}</dt><dd>{percent(one.windows[window])}</dd></div>"
        for window in WINDOWS_MS
    )
    return (
        f'<section class="one"><div class="head"><h3>{name}</h3>'
        f'<span class="state {state.value}">{_WORDS[state]}</span></div>'
        f"{_bars(one, at_ms)}<dl>{shares}</dl></section>"
    )


def _bars(one: Uptime, at_ms: int) -> str:
    step_px, today_ms = BAR_PX + GAP_PX, day_of(at_ms)
    bars = []
    for place, count in enumerate(one.days):
        since_ms = today_ms - (KEPT_DAYS - 1 - place) * 86_400_000
        told = f"{_day(since_ms)}: {percent(count)} of {count.total:,}"
        bars.append(
            f'<rect class="b-{_grade(count)}" x="{place * step_px}" width="{BAR_PX}" '
            f'height="{BARS_PX}"><title>{told}</title></rect>'
        )
    width_px = KEPT_DAYS * step_px - GAP_PX
    label = f"{KEPT_DAYS} days: {percent(one.windows['90d'])}"
    return (
        f'<svg class="bars" viewBox="0 0 {width_px} {BARS_PX}" role="img" '
        f'preserveAspectRatio="none" aria-label="{label}">{"".join(bars)}</svg>'
    )


def _grade(count: Count) -> str:
    millionths = count.millionths
    if millionths is None:
        return "none"
    if millionths >= GOAL_MILLIONTHS:
        return "up"
    return "fair" if millionths >= FAIR_MILLIONTHS else "bad"


def _incidents(incidents: Sequence[Incident]) -> str:
    if not incidents:
        return f"<h2>Incidents</h2><p>None in {KEPT_DAYS} days.</p>"
    items = "".join(
        f"<li><strong>{escape(_headline(each))}</strong><br>"
        f'<span class="dim">{escape(_story(each))}</span></li>'
        for each in incidents[:INCIDENTS_SHOWN]
    )
    return f"<h2>Incidents</h2><ul>{items}</ul>"


def _headline(incident: Incident) -> str:
    kind, name = incident.subject
    what = "requests for" if kind is Kind.MODEL else "calls to"
    share = incident.count.failed * 100 // incident.count.total
    verb = "failed" if incident.until_ms is not None else "fail"
    return f"{share} % of {what} {name} {verb}"


def _story(incident: Incident) -> str:
    since = _time(incident.since_ms)
    count = incident.count
    told = f"{count.failed:,} of {count.total:,} within the minutes with failures."
    if incident.until_ms is None:
        return f"Since {since}. {told}"
    return f"{since} to {_time(incident.until_ms)}. {told}"


def _uptime(one: Uptime) -> dict[str, object]:
    return {
        "name": one.subject[1],
        "state": one.state.value,
        "windows": {
            window: {
                "availability": _share(count),
                "served": count.served,
                "failed": count.failed,
            }
            for window, count in one.windows.items()
        },
        "days": [_share(count) for count in one.days],
    }


def _incident(incident: Incident) -> dict[str, object]:
    kind, name = incident.subject
    return {
        "kind": kind.value,
        "name": name,
        "since_ms": incident.since_ms,
        "until_ms": incident.until_ms,
        "served": incident.count.served,
        "failed": incident.count.failed,
    }


def _share(count: Count) -> float | None:
    return None if count.millionths is None else count.millionths / 1_000_000


def _moment(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms / 1000, UTC)


def _stamp(at_ms: int) -> str:
    return f"{_moment(at_ms):%Y-%m-%dT%H:%M:%SZ}"


def _time(at_ms: int) -> str:
    return f"{_moment(at_ms):%Y-%m-%d %H:%M} UTC"


def _day(at_ms: int) -> str:
    return f"{_moment(at_ms):%Y-%m-%d}"


def _answer(body: bytes, media_type: str) -> Response[bytes]:
    headers = {
        "content-type": media_type,  # so that no charset is added to it
        "content-security-policy": POLICY,
        "cache-control": f"public, max-age={FRESH_S}",
        "referrer-policy": "no-referrer",
    }
    return Response(body, headers=headers)
