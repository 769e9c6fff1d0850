"""The commands of ``imageway``. Heavy parts are imported only by those in need."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.accounting import (
    grants,
    holds,
    import_,
    margin,
    reconcile,
    refund,
    resume,
    set_tenant,
    show_tenant,
    statement,
    suspend,
    trail,
    usage,
)
from gateway.generating import generate, show_estimate
from gateway.steering import reload, routes, upstreams
from gateway.terminal import (
    EXIT_FAILED,
    fail,
    listed,
    one_line_errors,
    overrides,
    print_json,
    read_settings,
    request_body,
    request_options,
    shared,
    show,
    show_rows,
    with_books,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.books import Books
    from gateway.flows.keys import NewKey
    from gateway.settings import Settings


WORKERS_MAX = 64


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="imageway")
def main() -> None:
    """Run imageway: a gateway in front of image models."""


# --- serve and check ---


@main.command()
@shared
@click.option("--host", help="Address to listen on. Default: the config's.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
@click.option(
    "--workers",
    type=click.IntRange(1, WORKERS_MAX),
    default=1,
    show_default=True,
    help="Processes that serve the port together, over PostgreSQL and Redis.",
)
@click.option("--seat", nargs=4, type=int, hidden=True)
def serve(
    config: Path | None,
    data_dir: Path | None,
    host: str | None,
    port: int | None,
    workers: int,
    seat: tuple[int, int, int, int] | None,
) -> None:
    """Run the gateway until SIGTERM or Ctrl-C; SIGHUP reads the config again."""
    from gateway import serving

    serving.hear_no_hang_up_yet()
    more = {"server.host": host, "server.port": None if port is None else str(port)}
    if workers > 1:
        settings = read_settings(config, data_dir, more, adapters=False)
        with one_line_errors():
            asyncio.run(_supervise(settings, workers, config, data_dir, more))
        return
    settings = read_settings(config, data_dir, more)
    read_again = _reader(config, data_dir, more)
    with one_line_errors(), asyncio.Runner(loop_factory=serving.event_loop) as runner:
        if seat is None:
            runner.run(_serve(settings, read_again))
        else:
            runner.run(_serve_beside(settings, read_again, seat))


def _reader(
    config: Path | None, data_dir: Path | None, more: dict[str, str | None]
) -> Callable[[], Settings]:
    def read_again() -> Settings:
        from gateway import app

        return app.read_settings(config, overrides(data_dir, more))

    return read_again


async def _serve(settings: Settings, read_again: Callable[[], Settings]) -> None:
    from gateway import app, serving

    async with app.started(settings, read_again) as (gateway, listening, first_key):
        port = int(listening.getsockname()[1])
        await serving.serve(
            gateway, listening, lambda: _greet(settings, port, first_key)
        )


async def _serve_beside(
    settings: Settings,
    read_again: Callable[[], Settings],
    seat: tuple[int, int, int, int],
) -> None:
    from gateway import app, serving

    place = serving.Place.taken(*seat)
    async with app.started(settings, read_again, place) as (gateway, listening, _):
        await serving.serve(gateway, listening, place.ready)


async def _supervise(
    settings: Settings,
    workers: int,
    config: Path | None,
    data_dir: Path | None,
    more: dict[str, str | None],
) -> None:
    from gateway.supervisor import supervise

    options = {
        "--config": config,
        "--data-dir": data_dir,
        "--host": more["server.host"],
        "--port": more["server.port"],
    }
    again = [sys.executable, "-m", "gateway", "serve"]
    for name, value in options.items():
        again += [] if value is None else [name, str(value)]

    def ready(port: int, first_key: str | None) -> None:
        _greet(settings, port, first_key)

    await supervise(
        settings, workers, lambda seat: [*again, "--seat", *map(str, seat)], ready
    )


def _greet(settings: Settings, port: int, secret: str | None) -> None:
    from gateway.books import warnings_of

    host = settings.server.host
    shown = f"[{host}]" if ":" in host else host
    url = settings.server.public_url or f"http://{shown}:{port}"
    click.echo(f"imageway runs at {url}  (stop it with Ctrl-C)")
    click.echo(f"  OpenAI base URL  {url}/v1")
    click.echo(f"  playground       {url}/")
    click.echo(f"  data             {settings.storage.data_dir.resolve()}")
    names = ", ".join(upstream.name for upstream in settings.upstreams)
    click.echo(f"  upstreams        {names}")
    for left in settings.left_out:
        click.echo(f"  left out         {left.upstream}: {left.reason}")
    for warning in warnings_of(settings):
        click.echo(f"  warning          {warning}")
    if settings.server.admin_key is None:
        click.echo("  admin routes     off: set IMAGEWAY_ADMIN_KEY to turn them on")
    if secret is None:
        click.echo("  another key      imageway keys create --tenant first")
        return
    click.echo(f"  API key          {secret}")
    click.echo("                   (1,000 credits; shown this once, so keep it)")
    click.echo("\nTry it:\n")
    click.echo(f"  curl -s {url}/v1/images/generations \\")
    click.echo(f"    -H 'Authorization: Bearer {secret}' \\")
    click.echo("    -H 'Content-Type: application/json' \\")
    body = {
        "model": "gpt-image-2",
        "prompt": "a lighthouse at dusk",
        "size": "16:9",
        "response_format": "url",
    }
    click.echo(f"    -d '{json.dumps(body)}'\n")


@main.command()
@shared
@click.option("--schema", is_flag=True, help="Print a JSON schema for editors.")
@click.option("--probe", is_flag=True, help="Test each credential with a free call.")
def check(
    config: Path | None, data_dir: Path | None, *, schema: bool, probe: bool
) -> None:
    """Check the configuration: everything that is wrong, at once.

    Exits 78 when the files are wrong; 1 when they ask for what cannot be done here, or
    a probe failed; else 0.
    """
    if schema:
        from gateway.settings import json_schema

        print_json(json_schema())
        return
    settings = read_settings(config, data_dir, {})
    with one_line_errors():
        from gateway import app
        from gateway.books import warnings_of

        offers = sum(map(len, app.checked_catalogue(settings).offers.values()))
        warnings = warnings_of(settings)
    for left in settings.left_out:
        click.echo(f"left out: {left.upstream}: {left.reason}")
    for warning in warnings:
        click.echo(f"warning: {warning}")
    click.echo(f"ok: {len(settings.upstreams)} upstreams, {offers} offers")
    if probe and not _probe(settings):
        sys.exit(EXIT_FAILED)


def _probe(settings: Settings) -> bool:
    """Test the credentials; tells whether none is bad."""
    from gateway import app

    with one_line_errors():
        probes = asyncio.run(app.probed(settings))
        trouble = asyncio.run(app.probed_store(settings))
    for each in probes:
        click.echo(f"probe {each.text}")
    if settings.storage.results is not None:
        click.echo(f"probe storage.results: {trouble or 'ok'}")
    return trouble is None and not any(each.has_failed for each in probes)


# --- tenants, keys, credits ---


@main.group()
def tenants() -> None:
    """Who owns credits."""


@tenants.command("create")
@listed
@click.argument("name")
@click.option("--credits", "amount", default="0", help="First grant, e.g. 1000 or 0.5.")
def tenants_create(
    config: Path | None, data_dir: Path | None, *, as_json: bool, name: str, amount: str
) -> None:
    """Make a tenant."""
    nanocredits = _nano(amount)

    async def run(books: Books) -> dict[str, str]:
        from gateway.core.money import decimal_text

        tenant = await books.tenants.create(name, nanocredits=nanocredits)
        balance = await books.tenants.balance(tenant.id)
        credits_text = decimal_text(balance.available)
        return {"tenant": name, "tenant_id": tenant.id, "credits": credits_text}

    made = with_books(config, data_dir, run, new=True)
    show(made, f"made tenant {name} with {made['credits']} credits", as_json=as_json)


@tenants.command("list")
@listed
def tenants_list(config: Path | None, data_dir: Path | None, *, as_json: bool) -> None:
    """List tenants and what they have."""

    async def run(books: Books) -> list[dict[str, str]]:
        from gateway.flows.credits import balance_texts

        return [
            {"tenant": tenant.name, "tenant_id": tenant.id, **balance_texts(balance)}
            for tenant, balance in await books.accounts.tenants()
        ]

    show_rows(with_books(config, data_dir, run), as_json=as_json)


@main.group()
def keys() -> None:
    """API keys of tenants."""


_LIMIT_OPTIONS = (
    click.option("--scopes", help="Of images, tasks, billing, admin: images,tasks."),
    click.option("--models", help="Models it may ask for: gpt-image-2,…"),
    click.option("--addresses", help="Where it may come from: 203.0.113.0/24,…"),
    click.option("--expires-at", help="When it ends: 2027-01-31T12:00:00Z."),
    click.option("--requests-per-minute", help="Requests for pictures a minute."),
    click.option("--concurrent-tasks", help="Tasks in flight at once."),
    click.option("--total-credits", help="Budget for good, e.g. 100 or 0.5."),
    click.option("--daily-credits", help="Budget of a day (UTC)."),
    click.option("--monthly-credits", help="Budget of a month (UTC)."),
    click.option(
        "--delivery",
        type=click.Choice(["auto", "sync", "async"]),
        help="Delivery mode of requests that do not say.",
    ),
    click.option(
        "--routing",
        help='Where requests go that do not say, e.g. \'{"only": ["openai"]}\'.',
    ),
)
_NONE = "none"
"""What takes a limit away."""


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that a key is limited by."""
    for option in reversed(_LIMIT_OPTIONS):
        command = option(command)
    return command


def _given(options: dict[str, str | None]) -> dict[str, object]:
    """Make of options what the admin API takes as JSON."""
    from gateway.core.preferences import parse_routing_text

    given: dict[str, object] = {}
    for name, text in options.items():
        if text is None:
            continue
        if text == _NONE:
            given[name] = None
        elif name in {"scopes", "models", "addresses"}:
            given[name] = [part.strip() for part in text.split(",")]
        elif name in {"requests_per_minute", "concurrent_tasks"}:
            short = text.isascii() and text.isdigit() and len(text) <= len("1000000")
            given[name] = int(text) if short else text
        else:
            given[name] = parse_routing_text(text) if name == "routing" else text
    return given


@keys.command("create")
@listed
@click.option("--tenant", required=True, help="The tenant's name.")
@limit_options
def keys_create(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    tenant: str,
    **options: str | None,
) -> None:
    """Make a key; it is shown this once."""

    async def run(books: Books) -> dict[str, Any]:
        owner = await books.tenants.named(tenant)
        made = await books.keys.create(owner, _given(options))
        return {**await _made(books, made), "tenant": tenant}

    made = with_books(config, data_dir, run)
    show(made, _made_text(made), as_json=as_json)


async def _made(books: Books, made: NewKey) -> dict[str, Any]:
    return {
        **books.keys.facts(made.key),
        "key": made.secret,
        "webhook_secret": await books.webhooks.secret(made.key.id),
    }


def _made_text(made: dict[str, Any]) -> str:
    return (
        f"{made['key']}\nwebhook secret: {made['webhook_secret']}\n"
        f"(both shown this once; id {made['key_id']})"
    )


def _key_lines(record: dict[str, Any]) -> str:
    lines = []
    for name, value in record.items():
        if isinstance(value, list):
            value = ", ".join(value)  # noqa: PLW2901 - as a person reads it
        if value not in (None, "", {}):
            lines.append(f"{name:<21}{value}")
    return "\n".join(lines)


@keys.command("list")
@listed
@click.option("--tenant", required=True, help="The tenant's name.")
def keys_list(
    config: Path | None, data_dir: Path | None, *, as_json: bool, tenant: str
) -> None:
    """List a tenant's keys."""

    async def run(books: Books) -> list[dict[str, Any]]:
        owner = await books.tenants.named(tenant)
        return [books.keys.facts(key) for key in await books.accounts.keys(owner.id)]

    found = with_books(config, data_dir, run)
    if as_json:
        print_json(found)
        return
    for each in found:
        shown = (each["key_id"], each["key"], each["delivery"], each["state"])
        routing = json.dumps(each["routing"]) if each["routing"] else ""
        click.echo("  ".join([*shown, routing]).rstrip())


@keys.command("show")
@listed
@click.argument("key_id")
def keys_show(
    config: Path | None, data_dir: Path | None, *, as_json: bool, key_id: str
) -> None:
    """Show a key, its limits and what it has used of them."""

    async def run(books: Books) -> dict[str, Any]:
        from gateway.flows.keys import use_facts

        view = await books.keys.show(key_id)
        return {**books.keys.facts(view.key), "used": use_facts(view)}

    found = with_books(config, data_dir, run)
    used = {f"used {name}": value for name, value in found["used"].items()}
    lines = _key_lines({**{k: v for k, v in found.items() if k != "used"}, **used})
    show(found, lines, as_json=as_json)


@keys.command("update")
@listed
@click.argument("key_id")
@limit_options
def keys_update(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    key_id: str,
    **options: str | None,
) -> None:
    """Change what is given of a key; "none" takes a limit away."""

    async def run(books: Books) -> dict[str, Any]:
        return books.keys.facts(await books.keys.change(key_id, _given(options)))

    changed = with_books(config, data_dir, run)
    show(changed, _key_lines(changed), as_json=as_json)


@keys.command("rotate")
@listed
@click.argument("key_id")
@click.option(
    "--overlap-s",
    type=click.IntRange(0),
    default=86_400,
    show_default=True,
    help="How long the old key stays valid, in seconds.",
)
def keys_rotate(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    key_id: str,
    overlap_s: int,
) -> None:
    """Make a key that takes another one's place; that one expires by itself."""

    async def run(books: Books) -> dict[str, Any]:
        made, before = await books.keys.rotate(key_id, overlap_s=overlap_s)
        return {**await _made(books, made), "previous": books.keys.facts(before)}

    made = with_books(config, data_dir, run)
    until = made["previous"]["expires_at"]
    text = f"{_made_text(made)}\n{key_id} is valid until {until}"
    show(made, text, as_json=as_json)


@keys.command("revoke")
@listed
@click.argument("key_id")
def keys_revoke(
    config: Path | None, data_dir: Path | None, *, as_json: bool, key_id: str
) -> None:
    """Take a key back."""

    async def run(books: Books) -> dict[str, str]:
        await books.keys.revoke(key_id)
        return {"key_id": key_id, "state": "revoked"}

    revoked = with_books(config, data_dir, run)
    show(revoked, f"revoked {key_id}", as_json=as_json)


@keys.command("rotate-webhook-secret")
@listed
@click.argument("key_id")
def keys_rotate_webhook_secret(
    config: Path | None, data_dir: Path | None, *, as_json: bool, key_id: str
) -> None:
    """Sign a key's webhooks anew; for 24 h the secret before signs too."""

    async def run(books: Books) -> dict[str, str]:
        secret = await books.webhooks.rotate(key_id)
        return {"key_id": key_id, "webhook_secret": secret}

    made = with_books(config, data_dir, run)
    text = f"{made['webhook_secret']}\n(shown this once)"
    show(made, text, as_json=as_json)


# --- tasks ---


@main.group()
def tasks() -> None:
    """What became of requests, and what is still to be made."""


@tasks.command("list")
@listed
@click.option("--tenant", required=True, help="The tenant's name.")
@click.option(
    "--status",
    type=click.Choice(["pending", "processing", "completed", "failed", "cancelled"]),
)
@click.option("--model", help="Only tasks of this model.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
def tasks_list(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    tenant: str,
    status: str | None,
    model: str | None,
    limit: int,
) -> None:
    """List a tenant's tasks, newest first."""

    async def run(books: Books) -> list[dict[str, str]]:
        from gateway.core.money import decimal_text
        from gateway.core.tasks import TaskState
        from gateway.ports import TaskFilter

        owner = await books.tenants.named(tenant)
        wanted = TaskFilter((TaskState(status),) if status else (), model)
        _, found = await books.queue.tasks(owner.id, wanted, offset=0, limit=limit)
        return [
            {
                "id": each.id,
                "model": each.variant,
                "status": each.state.value,
                "images": str(each.results),
                "credits_used": decimal_text(each.charged_nanocredits or 0),
            }
            for each in found
        ]

    show_rows(with_books(config, data_dir, run), as_json=as_json)


@tasks.command("cancel")
@listed
@click.argument("task_id")
def tasks_cancel(
    config: Path | None, data_dir: Path | None, *, as_json: bool, task_id: str
) -> None:
    """Cancel an async task: at once while it waits, soon while it runs."""

    async def run(books: Books) -> dict[str, str]:
        view = await books.cancel(task_id)
        return {
            "id": view.id,
            "status": "cancelling" if view.can_cancel else "cancelled",
        }

    done = with_books(config, data_dir, run)
    show(done, f"{done['id']} is {done['status']}", as_json=as_json)


# --- webhooks ---


@main.group()
def deliveries() -> None:
    """Webhooks: sent, to be sent, and given up."""


@deliveries.command("list")
@listed
@click.option("--tenant", help="The tenant's name. Default: all.")
@click.option("--state", type=click.Choice(["pending", "delivered", "failed"]))
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
def deliveries_list(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    tenant: str | None,
    state: str | None,
    limit: int,
) -> None:
    """List deliveries, newest first."""

    async def run(books: Books) -> list[dict[str, str]]:
        owner = await books.tenants.named(tenant) if tenant else None
        _, found = await books.webhooks.list(
            owner.id if owner else None, state=state, offset=0, limit=limit
        )
        return [
            {
                "id": each.id,
                "state": each.state,
                "tries": str(each.tries),
                "url": each.url,
                "error": each.error or "",
            }
            for each in found
        ]

    show_rows(with_books(config, data_dir, run), as_json=as_json)


@deliveries.command("redeliver")
@listed
@click.argument("delivery_id")
def deliveries_redeliver(
    config: Path | None, data_dir: Path | None, *, as_json: bool, delivery_id: str
) -> None:
    """Send a webhook again, under the same id; the running gateway does it."""

    async def run(books: Books) -> dict[str, str]:
        again = await books.webhooks.redeliver(delivery_id, None)
        return {"id": again.id, "state": again.state}

    again = with_books(config, data_dir, run)
    show(again, f"{delivery_id} is due again", as_json=as_json)


@main.group("credits")
def credits_() -> None:
    """What tenants have."""


@credits_.command("balance")
@listed
@click.option("--tenant", required=True, help="The tenant's name.")
def credits_balance(
    config: Path | None, data_dir: Path | None, *, as_json: bool, tenant: str
) -> None:
    """Show available, held and spent credits."""

    async def run(books: Books) -> dict[str, str]:
        from gateway.flows.credits import balance_texts

        owner = await books.tenants.named(tenant)
        return balance_texts(await books.tenants.balance(owner.id))

    balance = with_books(config, data_dir, run)
    lines = "\n".join(f"{name:<10}{amount}" for name, amount in balance.items())
    show(balance, lines, as_json=as_json)


@credits_.command("grant")
@listed
@click.option("--tenant", required=True, help="The tenant's name.")
@click.option("--reference", help="The same reference again changes nothing.")
@click.option("--expires-at", help="What is left then is taken back: 2027-01-31.")
@click.option("--note", help="What it is for.")
@click.argument("amount")
def credits_grant(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    tenant: str,
    reference: str | None,
    expires_at: str | None,
    note: str | None,
    amount: str,
) -> None:
    """Give a tenant credits, e.g. 250 or 0.5."""
    nanocredits = _nano(amount)

    async def run(books: Books) -> dict[str, str]:
        from gateway.core.statements import parse_end
        from gateway.flows.credits import balance_texts

        owner = await books.tenants.named(tenant)
        end_ms = None if expires_at is None else parse_end(expires_at, "expires_at")
        after = await books.tenants.grant(
            owner, nanocredits, reference=reference, expires_ms=end_ms, note=note
        )
        return balance_texts(after)

    balance = with_books(config, data_dir, run)
    show(balance, f"{tenant} now has {balance['available']} credits", as_json=as_json)


# --- prices ---


@main.command()
@listed
@request_options
def estimate(
    config: Path | None, data_dir: Path | None, *, as_json: bool, **options: Any
) -> None:
    """Tell what a request will cost its tenant, before it is made."""
    settings = read_settings(config, data_dir, {})
    body = request_body(options)
    with one_line_errors():
        from gateway import app

        priced = app.estimated(settings, body)
    show_estimate(app.as_json(priced), as_json=as_json)


for _command in (generate, import_, margin, reload, routes, trail, upstreams, usage):
    main.add_command(_command)
for _command in (grants, holds, reconcile, refund, statement):
    credits_.add_command(_command)
for _command in (resume, set_tenant, show_tenant, suspend):
    tenants.add_command(_command)


@main.command()
@listed
def audit(config: Path | None, data_dir: Path | None, *, as_json: bool) -> None:
    """Recompute every invariant of the books; exits 1 on any drift."""

    async def run(books: Books) -> dict[str, Any]:
        from dataclasses import asdict

        report = await books.audit()
        return {"clean": not report.drifts, **asdict(report)}

    report = with_books(config, data_dir, run)
    counts = ", ".join(
        f"{report[name]} {name}"
        for name in ("tenants", "entries", "holds_open", "settlements")
    )
    drifts = [
        f"{d['rule']} {d['invariant']}: {d['subject']}: {d['detail']}"
        for d in report["drifts"]
    ]
    verdict = "clean" if report["clean"] else "DRIFT"
    show(report, "\n".join([f"{verdict} ({counts})", *drifts]), as_json=as_json)
    if not report["clean"]:
        sys.exit(EXIT_FAILED)


@main.command()
@listed
def migrate(config: Path | None, data_dir: Path | None, *, as_json: bool) -> None:
    """Bring the database's schema up to date, as serve does when it starts."""

    async def run(books: Books) -> dict[str, int]:
        return {"schema": books.schema, "applied": books.migrations_applied}

    done = with_books(config, data_dir, run, new=True)
    text = f"schema {done['schema']}, {done['applied']} steps applied"
    show(done, text, as_json=as_json)


@main.command()
@click.option("--url", default="http://127.0.0.1:8080", show_default=True)
def healthcheck(url: str) -> None:
    """Ask a running gateway whether it is ready; exits 1 if not."""
    from urllib.error import URLError
    from urllib.request import urlopen

    if not url.startswith(("http://", "https://")):
        fail("--url must start with http:// or https://")
    try:
        with urlopen(f"{url}/health/ready", timeout=5) as answer:  # noqa: S310
            click.echo(answer.read().decode())
    except (URLError, OSError, ValueError) as error:
        fail(f"{url} is not ready: {error}")


def _nano(text: str) -> int:
    from gateway.core.money import parse_nano

    try:
        return parse_nano(text)
    except ValueError as error:
        fail(f"credits {error}")
