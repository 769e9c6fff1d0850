"""The command ``imageway generate``: a prompt goes in, files come out.

A client of a gateway that runs, here or elsewhere. Its exit codes are a contract:
0 done, 1 failed or refused, 2 asked wrongly, 3 the gateway cannot be reached, 4 still
running when ``--wait`` was over, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import secrets
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import click
from click.core import ParameterSource

from gateway.terminal import EXIT_CONFIG, EXIT_FAILED, leave_at_once, local_url

if TYPE_CHECKING:
    from gateway.remote import (
        GatewayClient,
        Order,
        Picture,
        RemoteTask,
        Target,
        Tell,
        Waited,
    )

EXIT_AWAY = 3
EXIT_RUNNING = 4
EXIT_STOPPED = 130
"""As shells count a SIGINT."""

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""What a file's extension says of its format."""
ELSEWHERE = ("https://", "http://", "data:", "file_")
"""References that the gateway finds by itself begin like this."""
STAND_IN = "https://example.com/image.png"
"""For pictures in an estimate: their number counts, and nothing is sent."""
ALMOST_PERCENT = 95
"""As far as a bar goes by what usually was enough; the rest is to have the files."""

_OPTIONS = (
    click.argument("prompt", required=False),
    click.option("--model", help="Default: the gateway's."),
    click.option("--size", help="16:9, 1024x1024, auto…"),
    click.option("--resolution", type=click.Choice(["1K", "2K", "4K"], False)),  # noqa: FBT003
    click.option("--quality", help="low, medium, high… as the model has them."),
    click.option("-n", "--n", type=click.IntRange(min=1), default=1, show_default=True),
    click.option(
        "--format",
        "output_format",
        type=click.Choice(["png", "jpeg", "webp"]),
        help="Default: what --out ends in, else png.",
    ),
    click.option("--background", type=click.Choice(["auto", "opaque", "transparent"])),
    click.option(
        "--ref",
        "references",
        multiple=True,
        help="A file, URL or file id to start from; may be given several times.",
    ),
    click.option("--mask", help="A PNG whose clear parts are to be painted anew."),
    click.option(
        "--out",
        default=".",
        help="A folder, or a file if it ends in .png, .jpg or .webp.",
        show_default=True,
    ),
    click.option("--force", is_flag=True, help="Overwrite files that are there."),
    click.option("--resume", metavar="TASK_ID", help="Fetch what was ordered before."),
    click.option("--estimate", is_flag=True, help="Tell the price, and send nothing."),
    click.option(
        "--wait",
        "wait_s",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="Stop waiting after so long, with exit code 4. Default: never.",
    ),
    click.option(
        "--cancel-on-interrupt",
        is_flag=True,
        help="Let Ctrl-C cancel the task too.",
    ),
    click.option(
        "--idempotency-key", help="The same key again buys nothing a second time."
    ),
    click.option(
        "--url",
        envvar="IMAGEWAY_URL",
        show_envvar=True,
        help="The gateway. Default: where the config says that it listens.",
    ),
    click.option(
        "--key",
        envvar="IMAGEWAY_KEY",
        show_envvar=True,
        help="An API key. Others on this machine can see options, but no variables.",
    ),
    click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        help="The config file. Also IMAGEWAY_CONFIG.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    click.option("-q", "--quiet", is_flag=True, help="No bar, and paths only."),
)


def _with_options(command: Any) -> Any:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class Asked:
    """The options, as they were given; named as the command's parameters are."""

    prompt: str | None
    model: str | None
    size: str | None
    resolution: str | None
    quality: str | None
    n: int
    output_format: str | None
    background: str | None
    references: tuple[str, ...]
    mask: str | None
    out: str
    force: bool
    resume: str | None
    estimate: bool
    wait_s: float | None
    cancel_on_interrupt: bool
    idempotency_key: str | None
    url: str | None
    key: str | None = field(repr=False)
    config: Path | None
    as_json: bool
    quiet: bool


class _Stoppable(click.Command):
    """Ends with 130 on Ctrl-C wherever it comes; click would say 1 and "Aborted!"."""

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        with _stoppable():
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        with _stoppable():
            return super().invoke(ctx)


@contextmanager
def _stoppable() -> Iterator[None]:
    # Once there is an order, ``_Standing`` says more.
    try:
        yield
    except KeyboardInterrupt:
        _end(EXIT_STOPPED, "stopped")


@click.command(cls=_Stoppable)
@_with_options
@click.pass_context
def generate(context: click.Context, /, **options: Any) -> None:
    """Have pictures made by a running gateway, and fetch them into files.

    \b
    imageway generate "a fox in the snow" --size 3:1 --quality low --out fox.png
    imageway generate "add a hat" --ref fox.png --mask hat.png -n 2 --out hats
    """  # noqa: D301 - the backspace keeps the lines apart
    from gateway.remote import Waited, opened

    asked = Asked(**options)
    _check(asked)
    url, key = _gateway_url(asked), _key(asked.key)
    target = _target(asked)
    order = _order(asked, target)
    so_far = Waited(task_id=asked.resume)
    standing = _Standing(context, asked, order, url, so_far)
    with opened(url, key) as client, standing.told(client):
        if asked.estimate:
            priced = client.estimate(order.body(_stand_in))
            show_estimate(priced, as_json=asked.as_json)
            return
        with _bar(quiet=asked.quiet) as tell:
            task, files = _made(client, asked, order, target, so_far, tell)
    _report(task, files, asked, standing)


def show_estimate(priced: str, *, as_json: bool) -> None:
    """Print an estimate, given as its JSON; its decimals stay exact."""
    if as_json:
        click.echo(priced)
        return
    shown = json.loads(priced, parse_float=str, parse_int=str)
    click.echo(f"{shown['model']} {shown['size']} {shown['quality']} x {shown['n']}")
    for end in ("low", "high"):
        quote = shown[end]
        tokens = {k: v for k, v in quote["tokens"].items() if v != "0"}
        counts = ", ".join(f"{k} {v}" for k, v in tokens.items())
        click.echo(
            f"  {end:<5}{quote['credits']} credits  ${quote['usd']}  ({counts} tokens)"
        )


# --- what is asked ---


def _check(asked: Asked) -> None:
    if asked.resume is not None:
        _check_resumed(asked, asked.resume)
        return
    if asked.prompt is None and not asked.estimate:
        raise click.UsageError("Give a prompt, in quotes, or --resume TASK_ID.")
    try:
        (asked.prompt or "").encode()
    except UnicodeEncodeError:
        raise click.UsageError("The prompt is not text in UTF-8.") from None
    if asked.mask is not None and not asked.references:
        raise click.UsageError("--mask needs the picture that it belongs to, as --ref.")


def _check_resumed(asked: Asked, task_id: str) -> None:
    from gateway.remote import is_task_id

    if asked.prompt is not None or asked.estimate:
        raise click.UsageError("--resume takes no prompt and no --estimate.")
    if not is_task_id(task_id):
        raise click.UsageError(
            "--resume takes a task id, such as task-unified-1795562712-mkoreuok."
        )


def _gateway_url(asked: Asked) -> str:
    url = asked.url or _configured_url(asked.config)
    try:
        parts = urlsplit(url)
        port_is_one = parts.port != 0
    except ValueError:
        parts, port_is_one = urlsplit(""), False
    wrong = "@" in parts.netloc or parts.query or parts.fragment
    if parts.scheme not in {"http", "https"} or not parts.hostname or not port_is_one:
        raise click.UsageError("--url must be like http://127.0.0.1:8080.")
    if wrong:
        raise click.UsageError("--url must be an address, and nothing else.")
    return url.rstrip("/").removesuffix("/v1")


def _configured_url(config: Path | None) -> str:
    from gateway.settings import ConfigError, load_settings

    try:
        server = load_settings(config, kinds=None).server
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"imageway: {problem}", err=True)
        sys.exit(EXIT_CONFIG)
    return local_url(server)


def _key(given: str | None) -> str:
    key = (given or "").strip()
    if not key:
        raise click.UsageError("Give an API key: set IMAGEWAY_KEY, or --key.")
    if not key.isascii() or not key.isprintable() or " " in key:
        # What is wrong with it is not shown: it may be half a key.
        raise click.UsageError("The API key has characters that no key has.")
    return key


def _target(asked: Asked) -> Target:
    from gateway.remote import TargetTakenError

    keep = asked.resume is not None
    target = target_of(asked.out, force=asked.force, keep=keep)
    says = _format_of(target)
    if says is not None and asked.output_format not in {None, says}:
        raise click.UsageError(
            f"--out {target.name} says {says}, and --format says {asked.output_format}."
        )
    if not asked.estimate:
        try:
            target.check_free(asked.n)
        except (TargetTakenError, OSError) as error:
            raise click.UsageError(f"{error}.") from error
    return target


def target_of(out: str, *, force: bool, keep: bool = False) -> Target:
    """Read ``--out``: a folder, or a file if it ends in the extension of a picture."""
    from gateway.remote import Target

    path = Path(out)
    ends = path.suffix.lower()
    if path.is_dir() or out.endswith("/") or not ends:
        return Target(path, force=force, keep=keep)
    if ends not in FORMATS:
        raise click.UsageError(
            f"--out must end in {', '.join(FORMATS)} to be a file, or in / to be a "
            "folder."
        )
    return Target(path.parent, path.name, force=force, keep=keep)


def _format_of(target: Target) -> str | None:
    return FORMATS[Path(target.name).suffix.lower()] if target.name else None


def _order(asked: Asked, target: Target) -> Order:
    from gateway.remote import Order

    fields = {
        "prompt": asked.prompt,
        "model": asked.model,
        "size": asked.size,
        "resolution": asked.resolution,
        "quality": asked.quality,
        "n": asked.n,
        "output_format": asked.output_format or _format_of(target),
        "background": asked.background,
    }
    return Order(
        fields={name: value for name, value in fields.items() if value is not None},
        references=tuple(_picture(text, "--ref") for text in asked.references),
        mask=None if asked.mask is None else _picture(asked.mask, "--mask"),
        idempotency_key=asked.idempotency_key or secrets.token_hex(16),
    )


def _picture(text: str, option: str) -> Picture:
    path = Path(text)
    if path.is_file():
        return path
    if text.lower().startswith(ELSEWHERE):
        return text
    raise click.UsageError(f"{option}: there is no file {text}.")


def _stand_in(_: Picture) -> str:
    return STAND_IN


# --- what is done ---


def _made(
    client: GatewayClient,
    asked: Asked,
    order: Order,
    target: Target,
    so_far: Waited,
    tell: Tell,
) -> tuple[RemoteTask, list[Path]]:
    from gateway.remote import Pace, fetch, follow, place

    pace = Pace()
    if asked.resume is None:
        task = place(client, order, so_far, tell, pace)
    else:
        task = client.task(asked.resume)
    if not asked.quiet and not sys.stderr.isatty():
        click.echo(f"task {task.id}", err=True)  # the only sign of life in a log
    task = follow(client, task, asked.wait_s, tell, pace)
    if not task.links:
        return task, []
    if _format_of(target) not in {None, task.output_format}:
        raise click.UsageError(
            f"The pictures of {task.id} are {task.output_format}: --out "
            f"{target.name} says otherwise."
        )
    return task, fetch(client, task, target, tell, pace)


def _report(
    task: RemoteTask, files: list[Path], asked: Asked, standing: _Standing
) -> None:
    if asked.as_json:
        told = {
            "task_id": task.id,
            "status": task.status,
            "files": [str(path) for path in files],
            "credits_used": task.credits_used,
            "error": task.failure,
        }
        click.echo(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        for path in files:
            click.echo(path)
    if not task.over:
        _end(EXIT_RUNNING, f"{task.id} is not over yet", standing.how_to_go_on())
    if task.status != "completed":
        _end(EXIT_FAILED, f"{task.id} {task.status}: {task.failure or 'no reason'}")
    if not files:
        _end(EXIT_FAILED, f"the pictures of {task.id} are not kept any more")
    if not asked.quiet:
        _show_bill(task, files, asked)


def _show_bill(task: RemoteTask, files: list[Path], asked: Asked) -> None:
    if asked.resume is None and len(files) < asked.n:
        click.echo(f"{len(files)} of {asked.n} pictures were made", err=True)
    if not asked.as_json:
        click.echo(f"{task.credits_used} credits used by {task.id}", err=True)


@dataclass(frozen=True, slots=True)
class _Standing:
    """Says where an order stands when it cannot be carried to its end."""

    context: click.Context
    asked: Asked
    order: Order
    url: str
    so_far: Waited

    @contextmanager
    def told(self, client: GatewayClient) -> Iterator[None]:
        """Turn what can go wrong into a line or two and an exit code."""
        from gateway.remote import AwayError, RefusedError, TargetTakenError

        try:
            yield
        except AwayError as error:
            _end(EXIT_AWAY, str(error), self._where_it_stands())
        except (RefusedError, TargetTakenError, OSError) as error:
            _end(EXIT_FAILED, str(error), self._where_it_stands())
        except KeyboardInterrupt:
            self._stopped(client)

    def how_to_go_on(self) -> str:
        """Return the command that picks the task up."""
        words = ["imageway", "generate", "--resume", str(self.so_far.task_id)]
        for name in ("url", "out", "config"):
            source = self.context.get_parameter_source(name)
            if source is ParameterSource.COMMANDLINE:
                words += [f"--{name}", str(getattr(self.asked, name))]
        return f"go on with: {shlex.join(words)}"

    def _where_it_stands(self) -> str:
        if self.so_far.task_id is not None:
            return self.how_to_go_on()
        if not self.so_far.sent:
            return ""
        arrived = "the order may have arrived all the same: "
        if self.order.brings_files:
            # Uploaded anew it would be another order to the gateway.
            return f"{arrived}look at GET {self.url}/v1/tasks before you repeat it"
        again = f"--idempotency-key {shlex.quote(self.order.idempotency_key)}"
        return f"{arrived}repeated with {again}, it is not bought twice"

    def _stopped(self, client: GatewayClient) -> NoReturn:
        ordered = self.so_far.sent or self.so_far.task_id is not None
        if self.asked.cancel_on_interrupt and ordered:
            _end(EXIT_STOPPED, f"stopped; {self._cancelled(client)}")
        task_id = self.so_far.task_id
        if task_id is None:
            stands = self._where_it_stands() or "nothing was ordered"
            _end(EXIT_STOPPED, "stopped", stands)
        goes_on = f"stopped; {task_id} goes on at the gateway"
        _end(EXIT_STOPPED, goes_on, self.how_to_go_on())

    def _cancelled(self, client: GatewayClient) -> str:
        from gateway.remote import AwayError, Pace, RefusedError, stop

        try:
            task = stop(client, self.order, self.so_far, Pace())
        except (AwayError, RefusedError) as error:
            what = self.so_far.task_id or "the order"
            return f"{what} could not be cancelled: {error}"
        return f"{task.id} is {'cancelled' if task.over else 'being cancelled'}"


@contextmanager
def _bar(*, quiet: bool) -> Iterator[Tell]:
    if quiet or not sys.stderr.isatty():
        yield lambda _doing, _percent: None
        return
    bar = click.progressbar(
        length=100,
        file=sys.stderr,
        show_eta=False,
        item_show_func=lambda doing: doing or "",
        update_min_steps=0,  # what is being done changes while the bar stands still
    )
    with bar:

        def tell(doing: str, percent: int) -> None:
            at = 100 if doing == "done" else min(percent, ALMOST_PERCENT)
            bar.update(max(at - bar.pos, 0), doing)

        yield tell


def _end(code: int, *lines: str) -> NoReturn:
    for line in lines:
        if line:
            click.echo(f"imageway: {line}", err=True)
    if code == EXIT_STOPPED:
        # Ctrl-C may have come while a lock was held that closing would wait for.
        leave_at_once(code)
    sys.exit(code)
