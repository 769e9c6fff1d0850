"""What commands have in common: their options, settings, books and output.

Heavy parts are imported only when they are needed: most commands end sooner than those
would load.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.books import Books
    from gateway.settings import Server, Settings

EXIT_FAILED = 1
EXIT_CONFIG = 78
"""EX_CONFIG of sysexits."""

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])


def shared(command: Command) -> Command:
    """Give a command the options that say which gateway it is about."""
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


def listed(command: Command) -> Command:
    """Give a command those, and ``--json``."""
    shown = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    return shared(shown(command))


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


def request_options(command: Command) -> Command:
    """Give a command the options that a request is made of."""
    for option in reversed(_REQUEST_OPTIONS):
        command = option(command)
    return command


def request_body(options: dict[str, Any]) -> object:
    """Make a body of those options; ends the command if it is none."""
    if options["body"] is not None:
        try:
            return json.loads(options["body"])
        except ValueError as error:
            fail(f"--body is not JSON: {error}")
    names = ("model", "prompt", "size", "resolution", "quality", "n")
    body = {k: options[k] for k in names if options[k] is not None}
    if options["references"]:
        body["image_urls"] = ["https://example.com/image.png"] * options["references"]
    return body


def local_url(server: Server) -> str:
    """Tell where a gateway on this machine listens, by its config."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)  # noqa: S104
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{server.port}"


def read_settings(
    config: Path | None,
    data_dir: Path | None,
    more: dict[str, str | None],
    *,
    adapters: bool = True,
) -> Settings:
    """Read the config; ends the command with all that is wrong with it.

    Without ``adapters`` it is not seen whether there is one for every upstream, which
    takes longer than most commands do.
    """
    from gateway.settings import ConfigError

    if adapters:
        from gateway.app import read_settings as read
    else:
        from gateway.books import read_settings as read

    try:
        return read(config, overrides(data_dir, more))
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"imageway: {problem}", err=True)
        sys.exit(EXIT_CONFIG)


def overrides(data_dir: Path | None, more: dict[str, str | None]) -> dict[str, str]:
    """Gather what the command line says in place of the config."""
    given = {k: v for k, v in more.items() if v is not None}
    if data_dir is not None:
        given["storage.data_dir"] = str(data_dir)
    return given


def with_books(
    config: Path | None,
    data_dir: Path | None,
    run: Callable[[Books], Awaitable[T]],
    *,
    new: bool = False,
) -> T:
    """Run something over the books of a config; ends the command on errors."""
    settings = read_settings(config, data_dir, {}, adapters=False)
    return with_settings(settings, run, new=new)


def with_settings(
    settings: Settings, run: Callable[[Books], Awaitable[T]], *, new: bool = False
) -> T:
    """Run something over the books; ends the command on errors."""
    from gateway.books import open_books

    async def opened() -> T:
        async with open_books(settings, new=new) as books:
            return await run(books)

    with one_line_errors():
        return asyncio.run(opened())


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can meet into a line, and end the command."""
    from gateway.books import StartError
    from gateway.core.errors import GatewayError

    try:
        yield
    except (StartError, GatewayError) as error:
        fail(str(error))


def show(record: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print a record as JSON, or what a person reads."""
    if as_json:
        print_json(record)
    else:
        click.echo(text)


def show_rows(rows: list[dict[str, str]], *, as_json: bool) -> None:
    """Print rows as JSON, or a line for each."""
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo("  ".join(row.values()))


def print_json(value: object) -> None:
    """Print as JSON, for people and programs."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def fail(message: str) -> NoReturn:
    """End the command with a line that says why."""
    click.echo(f"imageway: {message}", err=True)
    sys.exit(EXIT_FAILED)


def leave_at_once(code: int) -> NoReturn:
    """End the process as it stands: what the interpreter would tidy up is memory.

    What the process has open is given back by the system, unasked and unwaited for.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
