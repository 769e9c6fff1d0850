"""``imageway generate``: pictures made by a gateway that runs, fetched into files."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.e2e.gateways import COMMAND, Answer, LiveGateway, command, environment
from tests.e2e.pictures import (
    PATCHES,
    RED,
    alike,
    file_of,
    mask_that_clears_the_left_half,
)

NAMES = ("sandbox-thrifty", "sandbox-fair", "sandbox-dear")
CHEAP = ("--size", "3:1", "--quality", "low")
PIXELS = (1776, 592)
UNKNOWN = "task-unified-1795562712-aaaaaaaa"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "pictures"
    made.mkdir()
    return made


def variables(gateway: LiveGateway, key: str | None = None) -> dict[str, str]:
    return {"IMAGEWAY_URL": gateway.url, "IMAGEWAY_KEY": key or str(gateway.first_key)}


def generate(
    gateway: LiveGateway, folder: Path, *args: str, key: str | None = None
) -> Answer:
    done = command("generate", *args, cwd=folder, **variables(gateway, key))
    assert (key or str(gateway.first_key)) not in done.out + done.err
    assert "Traceback" not in done.err
    return done


def bought(gateway: LiveGateway) -> int:
    return sum(gateway.bought(name) for name in NAMES)


def task_of(gateway: LiveGateway, task_id: str) -> dict[str, object]:
    with gateway.client() as client:
        found = client.get(f"/v1/tasks/{task_id}").json()
    assert isinstance(found, dict)
    return found


def picture(path: Path) -> Image.Image:
    made = Image.open(io.BytesIO(path.read_bytes()))
    made.load()
    return made


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def id_in(text: str) -> str:
    found = re.search(r"task-unified-\d+-[a-z0-9]{8}", text)
    assert found, text
    return found[0]


# --- pictures come ---


def test_a_prompt_becomes_a_file_that_is_called_after_its_task(
    shared_gateway: LiveGateway, folder: Path
) -> None:
    done = generate(shared_gateway, folder, "a fox in the snow", *CHEAP)

    assert done.code == 0, done
    (path,) = done.out.splitlines()
    task_id = id_in(done.err)
    assert path == f"{task_id}-1.png"
    assert files(folder) == [path]
    made = picture(folder / path)
    assert (made.format, made.size) == ("PNG", PIXELS)
    usage = task_of(shared_gateway, task_id)["usage"]
    assert isinstance(usage, dict)
    assert f"{usage['credits_used']} credits used by {task_id}" in done.err


def test_several_pictures_of_a_format_share_a_name(
    shared_gateway: LiveGateway, folder: Path
) -> None:
    wanted = (*CHEAP, "-n", "2", "--background", "transparent")
    done = generate(shared_gateway, folder, "a fox", *wanted, "--out", "new/fox.webp")

    assert done.code == 0, done
    assert done.out.splitlines() == ["new/fox-1.webp", "new/fox-2.webp"]
    for path in done.out.splitlines():
        made = picture(folder / path)
        assert (made.format, made.size, made.mode) == ("WEBP", PIXELS, "RGBA")


def test_json_is_all_there_is_on_stdout(
    shared_gateway: LiveGateway, folder: Path
) -> None:
    before = shared_gateway.tenant("jason")
    wanted = (*CHEAP, "--format", "jpeg", "--json", "--quiet")
    done = generate(shared_gateway, folder, "a fox", *wanted, key=before)

    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told == {
        "task_id": told["task_id"],
        "status": "completed",
        "files": [f"{told['task_id']}-1.jpg"],
        "credits_used": shared_gateway.balance("jason")["spent"],
        "error": None,
    }
    assert picture(folder / told["files"][0]).format == "JPEG"


def test_files_of_this_machine_are_references_and_mask(
    shared_gateway: LiveGateway, folder: Path
) -> None:
    (folder / "red.png").write_bytes(file_of(RED))
    (folder / "mask.png").write_bytes(mask_that_clears_the_left_half())
    pictures = ("--ref", "red.png", "--mask", "mask.png")
    done = generate(
        shared_gateway, folder, "a cat", "--size", "1024x1024", *pictures, "--json"
    )

    assert done.code == 0, done
    made = picture(folder / json.loads(done.out)["files"][0])
    assert not alike(made, (100, 900), RED)
    assert alike(made, (900, 900), RED)
    with shared_gateway.client() as client:
        left = client.get("/api/v1/files/list").json()["data"]["total"]
    assert left == 0


def test_what_was_uploaded_before_is_a_reference_and_stays(
    shared_gateway: LiveGateway, folder: Path
) -> None:
    with shared_gateway.client() as client:
        uploaded = client.post(
            "/api/v1/files/upload/stream", files={"file": ("red.png", file_of(RED))}
        ).json()["data"]["file_id"]
        references = ("--ref", uploaded, "--ref", uploaded)
        done = generate(shared_gateway, folder, "a cat", *CHEAP, *references, "--json")
        client.delete(f"/api/v1/files/{uploaded}").raise_for_status()

    told = json.loads(done.out)
    usage = task_of(shared_gateway, told["task_id"])["usage"]
    assert isinstance(usage, dict)
    assert usage["input_tokens_details"]["image_tokens"] == 2 * PATCHES


def test_the_config_says_where_the_gateway_is(
    shared_gateway: LiveGateway, folder: Path
) -> None:
    env = {"IMAGEWAY__SERVER__PORT": shared_gateway.url.rpartition(":")[2]}
    key = str(shared_gateway.first_key)
    done = command(
        "generate", "a fox", *CHEAP, "--out", "fox.png", "--key", key, cwd=folder, **env
    )

    assert (done.code, done.out) == (0, "fox.png\n")
    assert picture(folder / "fox.png").size == PIXELS


def test_an_estimate_sends_nothing(gateway: LiveGateway, folder: Path) -> None:
    (folder / "red.png").write_bytes(file_of(RED))
    asked = ("a fox", *CHEAP, "-n", "2", "--ref", "red.png", "--estimate")
    shown = generate(gateway, folder, *asked)
    priced = generate(gateway, folder, *asked, "--json").json

    assert shown.code == 0
    assert f"high {priced['high']['credits']} credits" in shown.out
    assert (priced["n"], priced["reference_images"]) == (2, 1)
    assert bought(gateway) == 0
    with gateway.client() as client:
        assert client.get("/v1/tasks").json()["total"] == 0
    assert files(folder) == ["red.png"]


# --- what goes wrong, in words and codes ---


def test_a_file_that_is_there_stays_and_nothing_is_bought(
    gateway: LiveGateway, folder: Path
) -> None:
    (folder / "fox.png").write_bytes(b"dear to somebody")
    refused = generate(gateway, folder, "a fox", *CHEAP, "--out", "fox.png")

    assert refused.code == 2
    assert "fox.png is there already" in refused.err
    assert (folder / "fox.png").read_bytes() == b"dear to somebody"
    assert bought(gateway) == 0
    forced = generate(gateway, folder, "a fox", *CHEAP, "--out", "fox.png", "--force")
    assert forced.code == 0
    assert picture(folder / "fox.png").size == PIXELS


def test_a_task_that_fails_says_why(gateway: LiveGateway, folder: Path) -> None:
    gateway.sandbox(NAMES[0], failure_rate=1, failure_kind="content_policy")
    done = generate(gateway, folder, "a fox", *CHEAP, "--json")

    assert done.code == 1
    assert "content_policy_violation" in done.err
    told = json.loads(done.out)
    assert (told["status"], told["files"]) == ("failed", [])
    assert told["task_id"] in done.err
    assert "content_policy_violation" in told["error"]
    assert files(folder) == []


@pytest.mark.parametrize("reference", [(), ("--ref", "large.png")])
def test_without_credits_it_is_refused(
    shared_gateway: LiveGateway, folder: Path, reference: tuple[str, ...]
) -> None:
    with (folder / "large.png").open("wb") as large:
        large.truncate(40_000_000)
    key = shared_gateway.tenant(f"poor{len(reference)}", "0")
    done = generate(shared_gateway, folder, "a fox", *CHEAP, *reference, key=key)

    assert (done.code, done.out) == (1, "")
    assert "(insufficient_quota)" in done.err
    assert "Buy credits" in done.err


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("a fox", "--size", "99:1"), "invalid_value"),
        (("a fox", "--model", "gpt-image-9"), "model_not_found"),
        (("--resume", UNKNOWN), "task_not_found"),
        (("a fox", "--ref", "notes.txt"), "invalid_image"),
    ],
)
def test_what_the_gateway_refuses_is_told_in_its_words(
    shared_gateway: LiveGateway, folder: Path, args: tuple[str, ...], code: str
) -> None:
    (folder / "notes.txt").write_text("no picture")
    done = generate(shared_gateway, folder, *args)

    assert (done.code, done.out) == (1, "")
    assert f"({code})" in done.err


def test_an_unknown_key_is_refused(shared_gateway: LiveGateway, folder: Path) -> None:
    key = "iwk_live_30upOadZN4xKpY4ExQ3zG5nssTqUjh2dQHs2"
    done = generate(shared_gateway, folder, "a fox", *CHEAP, key=key)

    assert done.code == 1
    assert "(invalid_api_key)" in done.err


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("a fox", "--resume", UNKNOWN),
        ("--resume", "../../etc"),
        ("a fox", "--mask", "red.png"),
        ("a fox", "--ref", "missing.png"),
        ("a fox", "--out", "fox.gif"),
        ("a fox", "--out", "fox.png", "--format", "webp"),
        ("a fox", "--url", "ftp://127.0.0.1"),
        ("a fox", "--url", "http://me:pass@127.0.0.1"),
        ("a fox", "--url", "http://127.0.0.1:99999"),
        ("a fox", "--key", ""),
        ("a fox", "--key", "half a key\n"),
        ("a fox", "-n", "0"),
        (b"a f\xffx".decode("utf-8", "surrogateescape"),),
    ],
)
def test_what_is_asked_wrongly_is_not_sent(folder: Path, args: tuple[str, ...]) -> None:
    env = {"IMAGEWAY_URL": "http://127.0.0.1:9", "IMAGEWAY_KEY": "iwk_live_x"}
    done = command("generate", *args, cwd=folder, **env)

    assert (done.code, done.out) == (2, "")
    assert "half a key" not in done.err


def test_a_gateway_that_does_not_run_is_told_so(folder: Path) -> None:
    env = {"IMAGEWAY_URL": "http://127.0.0.1:9", "IMAGEWAY_KEY": "iwk_live_x"}
    for args in (("a fox",), ("--resume", UNKNOWN, "--wait", "0"), ("--estimate",)):
        done = command("generate", *args, cwd=folder, **env)

        assert (done.code, done.out) == (3, "")
        assert "http://127.0.0.1:9" in done.err


# --- it takes longer ---


def test_when_the_wait_is_over_the_task_can_be_picked_up(
    gateway: LiveGateway, folder: Path
) -> None:
    gateway.sandbox(NAMES[0], latency_ms=2_500)
    early = generate(gateway, folder, "a fox", *CHEAP, "--wait", "0.5", "--json")

    assert early.code == 4
    task_id = json.loads(early.out)["task_id"]
    assert f"imageway generate --resume {task_id}" in early.err
    assert files(folder) == []
    late = generate(gateway, folder, "--resume", task_id, "--out", "fox.png")
    assert (late.code, late.out) == (0, "fox.png\n")
    assert picture(folder / "fox.png").size == PIXELS
    assert bought(gateway) == 1


def test_a_task_can_be_fetched_again_and_again(
    shared_gateway: LiveGateway, folder: Path
) -> None:
    first = generate(shared_gateway, folder, "a fox", *CHEAP, "-n", "2")
    task_id = id_in(first.out)
    missing = folder / f"{task_id}-2.png"
    missing.unlink()
    again = generate(shared_gateway, folder, "--resume", task_id)
    wrong = generate(shared_gateway, folder, "--resume", task_id, "--out", "x.webp")
    (folder / "x-1.png").write_bytes(b"mine")
    named = [
        generate(shared_gateway, folder, "--resume", task_id, "--out", "x.png")
        for _ in range(2)
    ]

    assert (again.code, again.out) == (0, first.out)
    assert picture(missing).size == PIXELS
    assert wrong.code == 2
    assert not (folder / "x.webp").exists()
    assert [(done.code, done.out) for done in named] == [(0, "x-1.png\nx-2.png\n")] * 2
    assert (folder / "x-1.png").read_bytes() == b"mine"
    assert picture(folder / "x-2.png").size == PIXELS


@contextmanager
def started(
    url: str, key: str | None, folder: Path, *args: str
) -> Iterator[subprocess.Popen[str]]:
    """Run the command beside the test."""
    # A shell's background jobs ignore Ctrl-C, and so does what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    run = subprocess.Popen(
        [*COMMAND, "generate", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(IMAGEWAY_URL=url, IMAGEWAY_KEY=str(key)),
    )
    signal.signal(signal.SIGINT, before)
    try:
        yield run
    finally:
        run.kill()
        run.communicate()


def first_id(run: subprocess.Popen[str]) -> str:
    assert run.stderr is not None
    return id_in(run.stderr.readline())


def test_ctrl_c_says_how_to_go_on_and_leaves_the_task_alone(
    gateway: LiveGateway, folder: Path
) -> None:
    gateway.sandbox(NAMES[0], latency_ms=2_000)
    wanted = ("a fox", *CHEAP, "--out", "fox.png", "--url", gateway.url)
    with started(gateway.url, gateway.first_key, folder, *wanted) as run:
        task_id = first_id(run)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=20)

    assert (run.returncode, out) == (130, "")
    go_on = re.search(r"go on with: imageway (.*)", err)
    assert go_on, err
    assert go_on[1] == f"generate --resume {task_id} --url {gateway.url} --out fox.png"
    done = command(*go_on[1].split(), cwd=folder, IMAGEWAY_KEY=str(gateway.first_key))
    assert (done.code, done.out) == (0, "fox.png\n")
    assert bought(gateway) == 1


def test_ctrl_c_cancels_the_task_if_that_was_asked_for(
    gateway: LiveGateway, folder: Path
) -> None:
    gateway.sandbox(NAMES[0], latency_ms=60_000)
    wanted = ("a fox", *CHEAP, "--cancel-on-interrupt")
    with started(gateway.url, gateway.first_key, folder, *wanted) as run:
        task_id = first_id(run)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=20)

    assert run.returncode == 130
    assert "cancelled" in err
    ended = generate(gateway, folder, "--resume", task_id)
    assert ended.code == 1
    assert "(request_cancelled)" in ended.err


def test_ctrl_c_before_the_answer_says_how_not_to_buy_twice(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with started(url, "iwk_live_x", folder, "a fox", *CHEAP) as run:
            silent.settimeout(20)
            asking, _ = silent.accept()
            with asking:
                assert asking.recv(65_536).startswith(b"POST /v1/images/generations")
                run.send_signal(signal.SIGINT)
                out, err = run.communicate(timeout=20)

    assert (run.returncode, out) == (130, "")
    assert "may have arrived" in err
    assert re.search("--idempotency-key [0-9a-f]{32},", err)


# --- the answer is lost ---


@contextmanager
def losing(gateway: LiveGateway, answers: int) -> Iterator[str]:
    """Stand before a gateway, and lose its first answers to an order."""
    lost = [answers]

    class Proxy(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            answer = self.forward(content=body)
            if self.path == "/v1/images/generations" and lost[0]:
                lost[0] -= 1
                self.close_connection = True
                return
            self.hand_on(answer)

        def do_GET(self) -> None:
            self.hand_on(self.forward())

        def forward(self, content: bytes | None = None) -> httpx.Response:
            return httpx.request(
                self.command,
                gateway.url + self.path,
                content=content,
                headers=dict(self.headers),
            )

        def hand_on(self, answer: httpx.Response) -> None:
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


def test_an_order_whose_answers_are_lost_is_bought_once(
    gateway: LiveGateway, folder: Path
) -> None:
    with losing(gateway, answers=2) as url:
        done = generate(gateway, folder, "a fox", *CHEAP, "--url", url)

    assert done.code == 0, done
    assert picture(folder / done.out.strip()).size == PIXELS
    assert bought(gateway) == 1
    with gateway.client() as client:
        assert client.get("/v1/tasks").json()["total"] == 1
    assert gateway.audit()["clean"]


def test_a_command_that_is_repeated_with_its_key_buys_nothing_more(
    gateway: LiveGateway, folder: Path
) -> None:
    wanted = ("a fox", *CHEAP, "--idempotency-key", "fox-of-today")
    first, again = (generate(gateway, folder, *wanted) for _ in range(2))
    other = generate(gateway, folder, *wanted, "-n", "2")

    assert first.code == again.code == 0
    assert first.out == again.out
    assert bought(gateway) == 1
    assert other.code == 1
    assert "(idempotency_conflict)" in other.err


# --- a terminal ---


def written_to(terminal: int) -> str:
    """Read all that a terminal was given, which comes in pieces, and close it."""
    shown = b""
    with os.fdopen(terminal, "rb", buffering=0) as seen, suppress(OSError):
        while piece := seen.read(65_536):
            shown += piece
    return shown.decode()


def test_a_terminal_gets_a_bar_and_stdout_stays_clean(
    shared_gateway: LiveGateway, folder: Path
) -> None:
    terminal, end = os.openpty()
    env = environment(**variables(shared_gateway), TERM="xterm")
    with os.fdopen(end, "wb") as stderr:
        done = subprocess.run(
            [*COMMAND, "generate", "a fox", *CHEAP, "--out", "fox.png"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=folder,
            env=env,
            timeout=60,
            check=True,
        )
    shown = written_to(terminal)

    assert done.stdout == b"fox.png\n"
    assert "asking" in shown
    assert "100%" in shown
    assert "credits used" in shown


def test_ctrl_c_while_it_is_still_being_loaded_ends_it_without_a_word(
    folder: Path,
) -> None:
    stays = "import time; print('loading', flush=True); time.sleep(60)"
    (folder / "click.py").write_text(stays)  # found before the real one
    with started("", "iwk_live_x", folder, "a fox") as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "loading\n"
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=20)

    assert (run.returncode, out, err) == (130, "", "")


def test_ctrl_c_while_it_starts_is_a_stop_like_others(folder: Path) -> None:
    config = folder / "gateway.toml"
    os.mkfifo(config)
    wanted = ("a fox", "--config", str(config))
    with (
        started("", "iwk_live_x", folder, *wanted) as run,
        config.open("wb"),  # it reads its config now, and gets none of it
    ):
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=20)

    assert (run.returncode, out) == (130, "")
    assert "Aborted" not in err
    assert "Traceback" not in err


def test_ctrl_c_before_the_answer_cancels_what_was_ordered(
    gateway: LiveGateway, folder: Path
) -> None:
    """Through a proxy that loses the first answer, as a slow network would."""
    gateway.sandbox(NAMES[0], latency_ms=60_000)
    arrived, asked = threading.Event(), list[str]()

    class Losing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"] or 0))
            carried = ("authorization", "idempotency-key", "prefer", "content-type")
            headers = {n: self.headers[n] for n in carried if self.headers[n]}
            asked.append(self.path)
            answer = httpx.post(gateway.url + self.path, content=body, headers=headers)
            if len(asked) == 1:
                arrived.set()
                stopped.wait(30)
                return
            self.send_response(answer.status_code)
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: object) -> None:
            return

    stopped = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Losing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        wanted = ("a fox", *CHEAP, "--cancel-on-interrupt")
        with started(url, gateway.first_key, folder, *wanted) as run:
            assert arrived.wait(20)
            run.send_signal(signal.SIGINT)
            _, err = run.communicate(timeout=30)
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()

    assert run.returncode == 130
    task_id = id_in(err)
    assert "cancelled" in err
    assert asked == ["/v1/images/generations"] * 2 + [f"/v1/tasks/{task_id}/cancel"]
    with gateway.client() as client:
        assert client.get("/v1/tasks").json()["total"] == 1
    ended = generate(gateway, folder, "--resume", task_id)
    assert "(request_cancelled)" in ended.err
