"""The commands ``imageway routes``, ``upstreams`` and ``reload``: where requests go.

Most of it is asked of a running gateway, with the admin key.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from gateway.terminal import (
    EXIT_FAILED,
    Command,
    fail,
    listed,
    local_url,
    one_line_errors,
    print_json,
    read_settings,
    request_body,
    request_options,
    show,
    show_rows,
    with_books,
    with_settings,
)

if TYPE_CHECKING:
    from gateway.books import Books
    from gateway.flows.reload import Asked
    from gateway.ports import TaskRecord
    from gateway.settings import Settings


RELOAD_WAIT_MAX_S = 10.0


def _asks_gateway(command: Command) -> Command:
    return click.option(
        "--url",
        envvar="IMAGEWAY_URL",
        show_envvar=True,
        help="The gateway. Default: where the config says that it listens.",
    )(command)


@click.group()
def routes() -> None:
    """Where requests go, and why."""


@routes.command("explain")
@listed
@request_options
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
        fail("--live explains a request, not a task")
    if live:
        settings = read_settings(config, data_dir, {}, adapters=False)
        _explain_live(_There(settings, url, as_json), key_id, options)
        return
    if task_id is None:
        _explain_request(read_settings(config, data_dir, {}), options, as_json=as_json)
        return

    async def run(books: Books) -> TaskRecord:
        from gateway.core.errors import NotFoundError

        record = await books.tasks.get(task_id)
        if record is None:
            raise NotFoundError(f"there is no task {task_id}")
        return record

    record = with_books(config, data_dir, run)
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
    body = request_body(options)
    with one_line_errors():
        from gateway import app

        route = app.route_of(settings, body)
    if as_json:
        print_json(route)
        return
    _show_route(route)


def _explain_live(there: _There, key_id: str | None, options: dict[str, Any]) -> None:
    body = options["body"] or json.dumps(request_body(options))
    path = "/admin/v1/routes/explain"
    if key_id is not None:
        path += f"?key_id={quote(key_id, safe='')}"
    answer = there.told("POST", path, body)
    if there.as_json:
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


@click.group()
def upstreams() -> None:
    """Accounts at providers: how they are doing, and taking them out of service."""


def _steers(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the gateway that it is about, in place of the options."""

    @listed
    @_asks_gateway
    @wraps(command)
    def steering(
        config: Path | None,
        data_dir: Path | None,
        *,
        as_json: bool,
        url: str | None,
        **more: str,
    ) -> None:
        settings = read_settings(config, data_dir, {}, adapters=False)
        command(_There(settings, url, as_json), **more)

    return steering


@upstreams.command("list")
@_steers
def upstreams_list(there: _There) -> None:
    """List upstreams as the running gateway sees them, else as the config has them."""
    from gateway.remote import AwayError

    try:
        found = json.loads(there.asked("GET", "/admin/v1/upstreams"))["data"]
    except (AwayError, _NoAdminKeyError) as error:
        if there.url is not None:
            fail(str(error))
        click.echo(f"imageway: {error}; this is what the config says", err=True)
        show_rows(_configured_upstreams(there.settings), as_json=there.as_json)
        return
    if there.as_json:
        print_json(found)
        return
    for upstream in found:
        _show_upstream(upstream)


@upstreams.command("drain")
@_steers
@click.argument("name")
def upstreams_drain(there: _There, name: str) -> None:
    """Let nothing new go to an upstream; what runs there ends by itself."""
    _change_upstream(there, "drain", name)


@upstreams.command("enable")
@_steers
@click.argument("name")
def upstreams_enable(there: _There, name: str) -> None:
    """Let new calls go to an upstream again."""
    _change_upstream(there, "enable", name)


@upstreams.command("reset")
@_steers
@click.argument("name")
def upstreams_reset(there: _There, name: str) -> None:
    """Close the breakers of an upstream in the running gateway."""
    done = json.loads(there.told("POST", _path_of(name, "reset")))
    if there.as_json:
        print_json(done)
        return
    _show_upstream(done)


def _change_upstream(there: _There, change: str, name: str) -> None:
    # In the store: it counts for every gateway on it within a second, and after a
    # restart. Only a gateway elsewhere has to be asked.
    if there.url is not None:
        there.told("POST", _path_of(name, change))
    else:
        with_settings(there.settings, lambda books: books.change_upstream(change, name))
    state = "drained" if change == "drain" else "in use"
    record = {"upstream": name, "state": state}
    show(record, f"{name} is {state}", as_json=there.as_json)


def _path_of(name: str, change: str) -> str:
    return f"/admin/v1/upstreams/{quote(name, safe='')}/{change}"


def _configured_upstreams(settings: Settings) -> list[dict[str, str]]:
    from gateway.books import drained_upstreams

    with one_line_errors():
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


class _NoAdminKeyError(Exception):
    """The gateway cannot be asked: there is no admin key to ask with."""


@dataclass(frozen=True, slots=True)
class _There:
    """The gateway that a command is about, and how it answers.

    Without ``url`` it is the one on this machine, where the config says.
    """

    settings: Settings
    url: str | None
    as_json: bool

    def told(self, method: str, path: str, body: str | None = None) -> str:
        """Ask, and end the command where there is no answer."""
        from gateway.remote import AwayError

        try:
            return self.asked(method, path, body)
        except (AwayError, _NoAdminKeyError) as error:
            fail(str(error))

    def asked(self, method: str, path: str, body: str | None = None) -> str:
        """Ask an admin route; ends the command if it refuses.

        Raises:
            AwayError: there is no answer.
            _NoAdminKeyError: there is nothing to ask with.
        """
        from gateway.remote import RefusedError, opened

        server = self.settings.server
        if server.admin_key is None:
            raise _NoAdminKeyError("there is no admin key (server.admin_key)")
        url = (self.url or local_url(server)).rstrip("/")
        try:
            with opened(url, server.admin_key) as client:
                return client.admin(method, path, body)
        except RefusedError as error:
            fail(str(error))


@click.command()
@listed
def reload(config: Path | None, data_dir: Path | None, *, as_json: bool) -> None:
    """Have all running gateways of a database read their configuration again.

    Each takes its own files over as a whole, or goes on as before. The files that this
    command sees are checked first. Exits 78 when they are wrong; 1 when a gateway
    refused or did not answer in 10 s, or none runs.
    """
    settings = read_settings(config, data_dir, {})

    async def run(books: Books) -> Asked:
        return await books.ask_to_reload(RELOAD_WAIT_MAX_S)

    asked = with_settings(settings, run)
    if not asked.done and not asked.late:
        fail("no gateway runs on this database")
    rows = [
        {
            "process": note.process_id,
            "outcome": "refused" if note.problem else "heeded",
            "problem": note.problem or "",
        }
        for note in asked.done
    ]
    rows += [
        {"process": note.process_id, "outcome": "no answer", "problem": ""}
        for note in asked.late
    ]
    show_rows(rows, as_json=as_json)
    if any(row["outcome"] != "heeded" for row in rows):
        sys.exit(EXIT_FAILED)
