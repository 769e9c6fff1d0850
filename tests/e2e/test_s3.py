"""A gateway that keeps its pictures in an S3 store: with it, and without it."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.gateways import LiveGateway, command
from tests.e2e.test_files import PNG
from tests.e2e.test_tasks import BODY, LATER, NAMES, PATH, bought, ended, made
from tests.object_store import S3Server, running_s3

WAIT_MAX_S = 60
UPLOADS = "/api/v1/files/upload/base64"


@pytest.fixture
def own_s3() -> Iterator[S3Server]:
    """A store that may be stopped: nobody else's pictures are in it."""
    with running_s3() as server:
        yield server


def storing(server: S3Server, bucket: str) -> dict[str, str]:
    """Tell a gateway to keep its pictures there."""
    prefix = "IMAGEWAY__STORAGE__RESULTS"
    return {
        prefix: f"s3://{bucket}/gateway",
        f"{prefix}_ENDPOINT": server.url,
        f"{prefix}_ACCESS_KEY": "an-id",
        f"{prefix}_SECRET_KEY": "hidden-secret",
    }


def quick(gateway: LiveGateway) -> None:
    for name in NAMES:
        gateway.sandbox(name, latency_ms=0)


def kinds_in(server: S3Server, bucket: str) -> set[str]:
    """Name the kinds of files that are kept there."""
    return {key.split("/")[2] for key in server.keys(bucket)}


def until_ready(gateway: LiveGateway, status: int) -> dict[str, str]:
    """Wait until the gateway calls itself ready, or not."""
    end = time.monotonic() + WAIT_MAX_S
    while time.monotonic() < end:
        answer = httpx.get(f"{gateway.url}/health/ready")
        if answer.status_code == status:
            checks = answer.json()["checks"]
            assert isinstance(checks, dict)
            return checks
        time.sleep(0.1)
    raise AssertionError(status)


def test_everything_is_kept_in_the_bucket_and_served_from_our_own_origin(
    s3: S3Server, tmp_path: Path
) -> None:
    bucket = s3.new_bucket()
    with LiveGateway(tmp_path, env=storing(s3, bucket)) as gateway:
        quick(gateway)
        with gateway.client(gateway.tenant("far")) as client:
            inline = client.post(PATH, json=BODY).json()
            picture = base64.b64decode(inline["data"][0]["b64_json"])
            shown = client.get(f"/v1/tasks/{inline['id']}").json()
            link = shown["results"][0]
            whole = httpx.get(link)
            tag = whole.headers["etag"]
            part = httpx.get(link, headers={"range": "bytes=-100"})
            same = httpx.get(link, headers={"if-none-match": tag})
            head = httpx.head(link)

            upload = client.post(
                UPLOADS, json={"base64_data": base64.b64encode(PNG).decode()}
            ).json()["data"]
            edited = ended(client, made(client, image_urls=[upload["file_id"]])["id"])
            until = time.monotonic() + WAIT_MAX_S
            while (kinds := kinds_in(s3, bucket)) != {"results", "uploads"}:
                # What a task was made of goes after its end.
                assert time.monotonic() < until, kinds
                time.sleep(0.05)
            client.delete(f"/api/v1/files/{upload['file_id']}")
            uploaded = httpx.get(upload["file_url"])
            left = kinds_in(s3, bucket)

        assert link.startswith(gateway.url)
        assert whole.content == picture
        assert (part.status_code, part.content) == (206, picture[-100:])
        assert same.status_code == 304
        assert head.headers["content-length"] == str(len(picture))
        assert edited["status"] == "completed", edited
        assert httpx.get(edited["results"][0]).content.startswith(b"\x89PNG")
        assert uploaded.status_code == 404
        assert left == {"results"}
        kept_here = [p for p in tmp_path.rglob("*") if p.suffix in {".raw", ".b64"}]
        assert kept_here == []
        assert "hidden-secret" not in "".join(gateway.logs)


def test_a_repeated_request_gets_its_pictures_from_the_bucket(
    s3: S3Server, tmp_path: Path
) -> None:
    env = storing(s3, s3.new_bucket())
    with LiveGateway(tmp_path, env=env) as gateway:
        quick(gateway)
        headers = {"idempotency-key": "once"}
        with gateway.client(gateway.tenant("again")) as client:
            first = client.post(PATH, json=BODY, headers=headers)
            again = client.post(PATH, json=BODY, headers=headers)

        assert again.headers["idempotency-replayed"] == "true"
        assert again.json()["data"] == first.json()["data"]
        assert bought(gateway) == 1


def test_without_its_store_a_gateway_starts_and_sells_nothing_until_it_is_back(
    own_s3: S3Server, tmp_path: Path
) -> None:
    bucket = own_s3.new_bucket()
    own_s3.stop()
    with LiveGateway(tmp_path, env=storing(own_s3, bucket)) as gateway:
        quick(gateway)
        with gateway.client(gateway.tenant("patient")) as client:
            checks = until_ready(gateway, 503)
            refused = [client.post(PATH, json=BODY, headers=h) for h in ({}, LATER)]
            upload = client.post(
                UPLOADS, json={"base64_data": base64.b64encode(PNG).decode()}
            )
            live = client.get("/health/live")
            away = gateway.metric("imageway_picture_store_away")
            own_s3.start()
            until_ready(gateway, 200)
            later = ended(client, made(client)["id"])
            back = gateway.metric("imageway_picture_store_away")

        assert f"{own_s3.url} cannot be reached" in checks["results"]
        assert live.status_code == 200
        for answer in (*refused, upload):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "storage_unavailable"
            assert answer.headers["retry-after"] == "30"
        assert later["status"] == "completed"
        assert bought(gateway) == 1
        assert (away[""], back[""]) == (1, 0)
        told = [line for line in gateway.logs if '"event":"store"' in line]
        assert ["away" in line for line in told] == [True, False]
        assert gateway.audit()["clean"]


def test_what_an_async_task_has_paid_for_waits_for_the_store(
    own_s3: S3Server, tmp_path: Path
) -> None:
    bucket = own_s3.new_bucket()
    with LiveGateway(tmp_path, env=storing(own_s3, bucket)) as gateway:
        quick(gateway)
        gateway.sandbox(NAMES[0], latency_ms=1_500)
        with gateway.client(gateway.tenant("waiting")) as client:
            task_id = made(client)["id"]
            time.sleep(0.5)  # so that it is under way
            own_s3.stop()
            until_ready(gateway, 503)
            during = client.get(f"/v1/tasks/{task_id}").json()
            own_s3.start()
            task = ended(client, task_id)
            picture = httpx.get(task["results"][0])

        assert during["status"] == "processing"
        assert task["status"] == "completed"
        assert picture.status_code == 200
        assert task["usage"]["credits_used"] > 0
        assert bought(gateway) == 1
        assert gateway.audit()["clean"]


def test_a_sync_answer_needs_no_store_and_a_link_that_cannot_be_given_is_free(
    own_s3: S3Server, tmp_path: Path
) -> None:
    bucket = own_s3.new_bucket()
    with LiveGateway(tmp_path, env=storing(own_s3, bucket)) as gateway:
        quick(gateway)
        gateway.sandbox(NAMES[0], latency_ms=1_500)
        one, other = gateway.tenant("inline"), gateway.tenant("linked")

        def ask(key: str, **changes: str) -> httpx.Response:
            with gateway.client(key) as client:
                return client.post(PATH, json=BODY | changes)

        with ThreadPoolExecutor(2) as pool:
            inline = pool.submit(ask, one)
            linked = pool.submit(ask, other, response_format="url")
            time.sleep(0.5)  # so that both are under way
            own_s3.stop()
            answer, refused = inline.result(), linked.result()
        own_s3.start()

        assert answer.status_code == 200
        assert base64.b64decode(answer.json()["data"][0]["b64_json"])[:4] == b"\x89PNG"
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "storage_unavailable"
        assert refused.headers["x-should-retry"] == "false"
        assert gateway.balance("linked")["spent"] == "0"
        assert gateway.balance("linked")["held"] == "0"
        assert gateway.audit()["clean"]


def test_a_probe_tells_whether_the_store_will_do(s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.new_bucket()
    check = ("check", "--probe", "--data-dir", str(tmp_path / "data"))

    good = command(*check, cwd=None, **storing(s3, bucket))
    bad = command(*check, cwd=None, **storing(s3, "not-there"))

    assert good.code == 0, good
    assert "probe storage.results: ok" in good.out
    assert bad.code == 1
    assert "probe storage.results: there is no bucket not-there: make it" in bad.out
    assert s3.keys(bucket) == []
