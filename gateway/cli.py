"""The ``imageway`` command. Heavy parts are imported only by the commands in need."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import quote

import click

from gateway.generating import (
    EXIT_CONFIG,
    EXIT_FAILED,
    generate,
    local_url,
    show_estimate,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.books import Books
    from gateway.ports import TaskRecord
    from gateway.settings import Settings

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])


def _shared(command: Command) -> Command:
    for option in (
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path, file_okay=False),
            help="Where the gateway remembers. Also IMAGEWAY_DATA_DIR.",
        ),
        click.option(
            "--config",
            type=click.Path(path_type=Path, dir_okay=False),
            help="The config file. Also IMAGEWAY_CONFIG.",
        ),
    ):
        command = option(command)
    return command


def _listed(command: Command) -> Command:
    shown = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    return _shared(shown(command))


def _asks_gateway(command: Command) -> Command:
    return click.option(
        "--url",
        envvar="IMAGEWAY_URL",
        show_envvar=True,
        help="The gateway. Default: where the config says that it listens.",
    )(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="imageway")
def main() -> None:
    """Run imageway: a gateway in front of image models."""


# --- serve and check ---


@main.command()
@_shared
@click.option("--host", help="Address to listen on. Default: the config's.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.")
def serve(
    config: Path | None, data_dir: Path | None, host: str | None, port: int | None
) -> None:
    """Run the gateway until SIGTERM or Ctrl-C."""
    more = {"server.host": host, "server.port": None if port is None else str(port)}
    settings = _settings(config, data_dir, more)
    from gateway import serving

    with _one_line_errors(), asyncio.Runner(loop_factory=serving.event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    from gateway import app, serving

    async with app.started(settings) as (gateway, listening, first_key):
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        url = settings.server.public_url or f"http://{shown}:{port}"
        warnings = app.warnings_of(settings)
        await serving.serve(
            gateway, listening, lambda: _greet(settings, url, warnings, first_key)
        )


def _greet(
    settings: Settings, url: str, warnings: tuple[str, ...], secret: str | None
) -> None:
    click.echo(f"imageway runs at {url}  (stop it with Ctrl-C)")
    click.echo(f"  OpenAI base URL  {url}/v1")
    click.echo(f"  data             {settings.storage.data_dir.resolve()}")
    names = ", ".join(upstream.name for upstream in settings.upstreams)
    click.echo(f"  upstreams        {names}")
    for left in settings.left_out:
        click.echo(f"  left out         {left.upstream}: {left.reason}")
    for warning in warnings:
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
@_shared
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

        _print_json(json_schema())
        return
    settings = _settings(config, data_dir, {})
    with _one_line_errors():
        from gateway import app

        offers = sum(map(len, app.checked_catalogue(settings).offers.values()))
        warnings = app.warnings_of(settings)
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

    with _one_line_errors():
        probes = asyncio.run(app.probed(settings))
    for each in probes:
        click.echo(f"probe {each.text}")
    return not any(each.has_failed for each in probes)


# --- tenants, keys, credits ---


@main.group()
def tenants() -> None:
    """Who owns credits."""


@tenants.command("create")
@_listed
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

    made = _with_books(config, data_dir, run, new=True)
    _show(made, f"made tenant {name} with {made['credits']} credits", as_json=as_json)


@tenants.command("list")
@_listed
def tenants_list(config: Path | None, data_dir: Path | None, *, as_json: bool) -> None:
    """List tenants and what they have."""

    async def run(books: Books) -> list[dict[str, str]]:
        from gateway.flows.credits import balance_texts

        return [
            {"tenant": tenant.name, "tenant_id": tenant.id, **balance_texts(balance)}
            for tenant, balance in await books.accounts.tenants()
        ]

    _show_rows(_with_books(config, data_dir, run), as_json=as_json)


@main.group()
def keys() -> None:
    """API keys of tenants."""


@keys.command("create")
@_listed
@click.option("--tenant", required=True, help="The tenant's name.")
@click.option(
    "--delivery",
    type=click.Choice(["auto", "sync", "async"]),
    default="auto",
    show_default=True,
    help="Delivery mode of requests that do not say.",
)
@click.option(
    "--routing",
    "routing_json",
    help='Where requests go that do not say, e.g. \'{"only": ["openai"]}\'.',
)
def keys_create(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    tenant: str,
    delivery: str,
    routing_json: str | None,
) -> None:
    """Make a key; it is shown this once."""
    settings = _settings(config, data_dir, {}, adapters=False)
    with _one_line_errors():
        from gateway.books import routing_of_key

        routing = routing_of_key(settings, routing_json)

    async def run(books: Books) -> dict[str, str]:
        owner = await books.tenants.named(tenant)
        made = await books.keys.create(owner, delivery=delivery, routing=routing)
        return {
            "key": made.secret,
            "key_id": made.key.id,
            "tenant": tenant,
            "webhook_secret": await books.webhooks.secret(made.key.id),
        }

    made = _with_books(config, data_dir, run)
    text = (
        f"{made['key']}\nwebhook secret: {made['webhook_secret']}\n"
        f"(both shown this once; id {made['key_id']})"
    )
    _show(made, text, as_json=as_json)


@keys.command("list")
@_listed
@click.option("--tenant", required=True, help="The tenant's name.")
def keys_list(
    config: Path | None, data_dir: Path | None, *, as_json: bool, tenant: str
) -> None:
    """List a tenant's keys."""

    async def run(books: Books) -> list[dict[str, str]]:
        from gateway.core.preferences import routing_text

        owner = await books.tenants.named(tenant)
        return [
            {
                "key_id": key.id,
                "key": key.display,
                "delivery": key.delivery,
                "state": "active" if key.revoked_ms is None else "revoked",
                "routing": routing_text(key.routing) or "",
            }
            for key in await books.accounts.keys(owner.id)
        ]

    _show_rows(_with_books(config, data_dir, run), as_json=as_json)


@keys.command("revoke")
@_listed
@click.argument("key_id")
def keys_revoke(
    config: Path | None, data_dir: Path | None, *, as_json: bool, key_id: str
) -> None:
    """Take a key back."""

    async def run(books: Books) -> dict[str, str]:
        await books.keys.revoke(key_id)
        return {"key_id": key_id, "state": "revoked"}

    revoked = _with_books(config, data_dir, run)
    _show(revoked, f"revoked {key_id}", as_json=as_json)


@keys.command("rotate-webhook-secret")
@_listed
@click.argument("key_id")
def keys_rotate_webhook_secret(
    config: Path | None, data_dir: Path | None, *, as_json: bool, key_id: str
) -> None:
    """Sign a key's webhooks anew; for 24 h the secret before signs too."""

    async def run(books: Books) -> dict[str, str]:
        secret = await books.webhooks.rotate(key_id)
        return {"key_id": key_id, "webhook_secret": secret}

    made = _with_books(config, data_dir, run)
    text = f"{made['webhook_secret']}\n(shown this once)"
    _show(made, text, as_json=as_json)


# --- tasks ---


@main.group()
def tasks() -> None:
    """What became of requests, and what is still to be made."""


@tasks.command("list")
@_listed
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

    _show_rows(_with_books(config, data_dir, run), as_json=as_json)


@tasks.command("cancel")
@_listed
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

    done = _with_books(config, data_dir, run)
    _show(done, f"{done['id']} is {done['status']}", as_json=as_json)


# --- webhooks ---


@main.group()
def deliveries() -> None:
    """Webhooks: sent, to be sent, and given up."""


@deliveries.command("list")
@_listed
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

    _show_rows(_with_books(config, data_dir, run), as_json=as_json)


@deliveries.command("redeliver")
@_listed
@click.argument("delivery_id")
def deliveries_redeliver(
    config: Path | None, data_dir: Path | None, *, as_json: bool, delivery_id: str
) -> None:
    """Send a webhook again, under the same id; the running gateway does it."""

    async def run(books: Books) -> dict[str, str]:
        again = await books.webhooks.redeliver(delivery_id, None)
        return {"id": again.id, "state": again.state}

    again = _with_books(config, data_dir, run)
    _show(again, f"{delivery_id} is due again", as_json=as_json)


@main.group("credits")
def credits_() -> None:
    """What tenants have."""


@credits_.command("balance")
@_listed
@click.option("--tenant", required=True, help="The tenant's name.")
def credits_balance(
    config: Path | None, data_dir: Path | None, *, as_json: bool, tenant: str
) -> None:
    """Show available, held and spent credits."""

    async def run(books: Books) -> dict[str, str]:
        from gateway.flows.credits import balance_texts

        owner = await books.tenants.named(tenant)
        return balance_texts(await books.tenants.balance(owner.id))

    balance = _with_books(config, data_dir, run)
    lines = "\n".join(f"{name:<10}{amount}" for name, amount in balance.items())
    _show(balance, lines, as_json=as_json)


@credits_.command("grant")
@_listed
@click.option("--tenant", required=True, help="The tenant's name.")
@click.option("--reference", help="The same reference again changes nothing.")
@click.argument("amount")
def credits_grant(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    tenant: str,
    reference: str | None,
    amount: str,
) -> None:
    """Give a tenant credits, e.g. 250 or 0.5."""
    nanocredits = _nano(amount)

    async def run(books: Books) -> dict[str, str]:
        from gateway.flows.credits import balance_texts

        owner = await books.tenants.named(tenant)
        after = await books.tenants.grant(owner, nanocredits, reference=reference)
        return balance_texts(after)

    balance = _with_books(config, data_dir, run)
    _show(balance, f"{tenant} now has {balance['available']} credits", as_json=as_json)


# --- prices, routes, tasks ---

_REQUEST_OPTIONS = (
    click.option("--model", default="gpt-image-2", show_default=True),
    click.option("--prompt", help="Counts towards the price where it is given."),
    click.option("--size", default="auto", show_default=True, help="16:9, 1024x1024…"),
    click.option("--resolution", type=click.Choice(["1K", "2K", "4K"], False)),  # noqa: FBT003
    click.option("--quality"),
    click.option("--n", type=int, default=1, show_default=True),
    click.option("--references", type=int, default=0, help="Reference images."),
    click.option("--body", help="The whole request as JSON, instead of the options."),
)


def _request_options(command: Command) -> Command:
    for option in reversed(_REQUEST_OPTIONS):
        command = option(command)
    return command


def _request_body(options: dict[str, Any]) -> object:
    if options["body"] is not None:
        try:
            return json.loads(options["body"])
        except ValueError as error:
            _fail(f"--body is not JSON: {error}")
    names = ("model", "prompt", "size", "resolution", "quality", "n")
    body = {k: options[k] for k in names if options[k] is not None}
    if options["references"]:
        body["image_urls"] = ["https://example.com/image.png"] * options["references"]
    return body


@main.command()
@_listed
@_request_options
def estimate(
    config: Path | None, data_dir: Path | None, *, as_json: bool, **options: Any
) -> None:
    """Tell what a request will cost its tenant, before it is made."""
    settings = _settings(config, data_dir, {})
    body = _request_body(options)
    with _one_line_errors():
        from gateway import app

        priced = app.estimated(settings, body)
    show_estimate(app.as_json(priced), as_json=as_json)


main.add_command(generate)


@main.group()
def routes() -> None:
    """Where requests go, and why."""


@routes.command("explain")
@_listed
@_request_options
@click.option(
    "--live", is_flag=True, help="Ask the running gateway, with the admin key."
)
@_asks_gateway
@click.option("--key-id", help="With --live: as a request of this key.")
@click.argument("task_id", required=False)
def routes_explain(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    task_id: str | None,
    live: bool,
    url: str | None,
    key_id: str | None,
    **options: Any,
) -> None:
    """Explain the route of a task, or where a request would go.

    With TASK_ID: the decision that was taken, and every attempt. Without: the order
    that a fresh gateway would try, by the options; with --live the order of this
    moment, and how every offer is doing.
    """
    if live and task_id is not None:
        _fail("--live explains a request, not a task")
    if live:
        settings = _settings(config, data_dir, {}, adapters=False)
        _explain_live(settings, url, key_id, options, as_json=as_json)
        return
    if task_id is None:
        _explain_request(_settings(config, data_dir, {}), options, as_json=as_json)
        return

    async def run(books: Books) -> TaskRecord:
        from gateway.core.errors import NotFoundError

        record = await books.tasks.get(task_id)
        if record is None:
            raise NotFoundError(f"there is no task {task_id}")
        return record

    record = _with_books(config, data_dir, run)
    from gateway import app

    explained = app.explained(record)
    if as_json:
        click.echo(app.as_json(explained))
        return
    click.echo(f"task {record.id}  {record.variant}  {record.state.value}")
    _show_route(json.loads(record.route_json or "[]"))
    for attempt in json.loads(app.as_json(explained), parse_float=str)["attempts"]:
        what = attempt["kind"] or attempt["state"]
        click.echo(
            f"  attempt {attempt['seq']}: {attempt['offer']}  {what}  "
            f"${attempt['cost_usd']}  {attempt['duration_ms']} ms  "
            f"{attempt['detail'] or ''}".rstrip()
        )


def _explain_request(
    settings: Settings, options: dict[str, Any], *, as_json: bool
) -> None:
    body = _request_body(options)
    with _one_line_errors():
        from gateway import app

        route = app.route_of(settings, body)
    if as_json:
        _print_json(route)
        return
    _show_route(route)


def _explain_live(
    settings: Settings,
    url: str | None,
    key_id: str | None,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    body = options["body"] or json.dumps(_request_body(options))
    path = "/admin/v1/routes/explain"
    if key_id is not None:
        path += f"?key_id={quote(key_id, safe='')}"
    answer = _admin(settings, url, "POST", path, body)
    if as_json:
        click.echo(answer)
        return
    explained = json.loads(answer, parse_float=str)
    _show_route(explained["route"])
    if explained["refusal"] is not None:
        click.echo(f"  refused: {explained['refusal']['message']}")


def _show_route(route: list[dict[str, Any]]) -> None:
    for place, candidate in enumerate(route, 1):
        cost = f"${candidate['cost_usd']}" if candidate["cost_usd"] else "unknown cost"
        why = candidate["reason"] or f"choice {place}"
        click.echo(
            f"  {candidate['offer']:<40} {cost:<16} {candidate['breaker']:<10} {why}"
        )


@main.group()
def upstreams() -> None:
    """Accounts at providers: how they are doing, and taking them out of service."""


@upstreams.command("list")
@_listed
@_asks_gateway
def upstreams_list(
    config: Path | None, data_dir: Path | None, *, as_json: bool, url: str | None
) -> None:
    """List upstreams as the running gateway sees them, else as the config has them."""
    from gateway.remote import AwayError

    settings = _settings(config, data_dir, {}, adapters=False)
    try:
        found = json.loads(_asked(settings, url, "GET", "/admin/v1/upstreams"))["data"]
    except (AwayError, _NoAdminKeyError) as error:
        if url is not None:
            _fail(str(error))
        click.echo(f"imageway: {error}; this is what the config says", err=True)
        _show_rows(_configured_upstreams(settings), as_json=as_json)
        return
    if as_json:
        _print_json(found)
        return
    for upstream in found:
        _show_upstream(upstream)


@upstreams.command("drain")
@_listed
@_asks_gateway
@click.argument("name")
def upstreams_drain(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    url: str | None,
    name: str,
) -> None:
    """Let nothing new go to an upstream; what runs there ends by itself."""
    settings = _settings(config, data_dir, {}, adapters=False)
    _change_upstream(settings, url, "drain", name, as_json=as_json)


@upstreams.command("enable")
@_listed
@_asks_gateway
@click.argument("name")
def upstreams_enable(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    url: str | None,
    name: str,
) -> None:
    """Let new calls go to an upstream again."""
    settings = _settings(config, data_dir, {}, adapters=False)
    _change_upstream(settings, url, "enable", name, as_json=as_json)


@upstreams.command("reset")
@_listed
@_asks_gateway
@click.argument("name")
def upstreams_reset(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    url: str | None,
    name: str,
) -> None:
    """Close the breakers of an upstream in the running gateway."""
    settings = _settings(config, data_dir, {}, adapters=False)
    path = f"/admin/v1/upstreams/{quote(name, safe='')}/reset"
    done = json.loads(_admin(settings, url, "POST", path))
    if as_json:
        _print_json(done)
        return
    _show_upstream(done)


def _change_upstream(
    settings: Settings, url: str | None, change: str, name: str, *, as_json: bool
) -> None:
    # In the store: it counts for every gateway on it within a second, and after a
    # restart. Only a gateway elsewhere has to be asked.
    if url is not None:
        path = f"/admin/v1/upstreams/{quote(name, safe='')}/{change}"
        _admin(settings, url, "POST", path)
    else:
        _with_settings(settings, lambda books: books.change_upstream(change, name))
    state = "drained" if change == "drain" else "in use"
    _show({"upstream": name, "state": state}, f"{name} is {state}", as_json=as_json)


def _configured_upstreams(settings: Settings) -> list[dict[str, str]]:
    from gateway.books import drained_upstreams

    with _one_line_errors():
        drained = asyncio.run(drained_upstreams(settings))
    rows = [
        {
            "upstream": upstream.name,
            "state": "drained" if upstream.name in drained else "in use",
            "reason": "",
        }
        for upstream in settings.upstreams
    ]
    return rows + [
        {"upstream": left.upstream, "state": "left out", "reason": left.reason}
        for left in settings.left_out
    ]


def _show_upstream(upstream: dict[str, Any]) -> None:
    slots = upstream["slots"]
    state = "drained" if upstream["drained"] else upstream["credential"]["state"]
    click.echo(
        f"{upstream['upstream']}  {state}  {slots['used']}/{slots['limit']} slots"
    )
    for offer in upstream["offers"]:
        seen, last = offer["window"], offer["last_failure"]
        parts = [f"{seen['good']} good, {seen['bad']} bad, {seen['slow']} slow"]
        if offer["reason"]:
            parts.append(offer["reason"])
        if offer["next_probe_in_ms"] is not None:
            parts.append(f"next probe in {offer['next_probe_in_ms']} ms")
        if offer["pause_ends_in_ms"] is not None:
            parts.append(f"rests for {offer['pause_ends_in_ms']} ms")
        if last is not None:
            parts.append(f"last failure {last['kind']}")
        name = f"{offer['offer']} {offer['operation']}"
        click.echo(f"  {name:<48} {offer['state']:<10} {'; '.join(parts)}")


@main.command()
@_listed
def audit(config: Path | None, data_dir: Path | None, *, as_json: bool) -> None:
    """Recompute every invariant of the books; exits 1 on any drift."""

    async def run(books: Books) -> dict[str, Any]:
        from dataclasses import asdict

        report = await books.audit()
        return {"clean": not report.drifts, **asdict(report)}

    report = _with_books(config, data_dir, run)
    counts = ", ".join(
        f"{report[name]} {name}"
        for name in ("tenants", "entries", "holds_open", "settlements")
    )
    drifts = [
        f"{d['invariant']}: {d['subject']}: {d['detail']}" for d in report["drifts"]
    ]
    verdict = "clean" if report["clean"] else "DRIFT"
    _show(report, "\n".join([f"{verdict} ({counts})", *drifts]), as_json=as_json)
    if not report["clean"]:
        sys.exit(EXIT_FAILED)


@main.command()
@click.option("--url", default="http://127.0.0.1:8080", show_default=True)
def healthcheck(url: str) -> None:
    """Ask a running gateway whether it is ready; exits 1 if not."""
    from urllib.error import URLError
    from urllib.request import urlopen

    if not url.startswith(("http://", "https://")):
        _fail("--url must start with http:// or https://")
    try:
        with urlopen(f"{url}/health/ready", timeout=5) as answer:  # noqa: S310
            click.echo(answer.read().decode())
    except (URLError, OSError, ValueError) as error:
        _fail(f"{url} is not ready: {error}")


# --- shared by the commands ---


class _NoAdminKeyError(Exception):
    """The gateway cannot be asked: there is no admin key to ask with."""


def _admin(
    settings: Settings, url: str | None, method: str, path: str, body: str | None = None
) -> str:
    from gateway.remote import AwayError

    try:
        return _asked(settings, url, method, path, body)
    except (AwayError, _NoAdminKeyError) as error:
        _fail(str(error))


def _asked(
    settings: Settings, url: str | None, method: str, path: str, body: str | None = None
) -> str:
    from gateway.remote import RefusedError, opened

    key = settings.server.admin_key
    if key is None:
        raise _NoAdminKeyError("there is no admin key (server.admin_key)")
    try:
        with opened((url or local_url(settings.server)).rstrip("/"), key) as client:
            return client.admin(method, path, body)
    except RefusedError as error:
        _fail(str(error))


def _settings(
    config: Path | None,
    data_dir: Path | None,
    more: dict[str, str | None],
    *,
    adapters: bool = True,
) -> Settings:
    # Loading the adapters takes longer than most commands take to run.
    from gateway.settings import ConfigError

    overrides = {k: v for k, v in more.items() if v is not None}
    if data_dir is not None:
        overrides["storage.data_dir"] = str(data_dir)
    if adapters:
        from gateway.app import read_settings
    else:
        from gateway.books import read_settings

    try:
        return read_settings(config, overrides)
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"imageway: {problem}", err=True)
        sys.exit(EXIT_CONFIG)


def _with_books(
    config: Path | None,
    data_dir: Path | None,
    run: Callable[[Books], Awaitable[T]],
    *,
    new: bool = False,
) -> T:
    return _with_settings(_settings(config, data_dir, {}, adapters=False), run, new=new)


def _with_settings(
    settings: Settings, run: Callable[[Books], Awaitable[T]], *, new: bool = False
) -> T:
    from gateway.books import open_books

    async def opened() -> T:
        async with open_books(settings, new=new) as books:
            return await run(books)

    with _one_line_errors():
        return asyncio.run(opened())


@contextmanager
def _one_line_errors() -> Iterator[None]:
    from gateway.books import StartError
    from gateway.core.errors import GatewayError

    try:
        yield
    except (StartError, GatewayError) as error:
        _fail(str(error))


def _nano(text: str) -> int:
    from gateway.core.money import parse_nano

    try:
        return parse_nano(text)
    except ValueError as error:
        _fail(f"credits {error}")


def _show(record: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        _print_json(record)
    else:
        click.echo(text)


def _show_rows(rows: list[dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        click.echo("  ".join(row.values()))


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _fail(message: str) -> NoReturn:
    click.echo(f"imageway: {message}", err=True)
    sys.exit(EXIT_FAILED)
