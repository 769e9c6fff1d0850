"""Starting: what is new, what is kept, and what is said when it cannot."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.e2e.gateways import ROOT, LiveGateway, command


def test_the_first_start_gives_a_key_and_credits_and_the_second_keeps_both(
    tmp_path: Path,
) -> None:
    gateway = LiveGateway(tmp_path / "data", fresh=True)
    with gateway:
        assert gateway.first_key is not None
        with gateway.client() as client:
            made = client.post("/v1/images/generations", json={"prompt": "a fox"})
            assert made.status_code == 200
        spent = gateway.balance("first")["spent"]
    key = gateway.first_key
    gateway.first_key = None
    with gateway:
        assert gateway.first_key is None
        assert gateway.balance("first")["spent"] == spent
        with gateway.client(key) as client:
            assert client.get("/v1/credits").status_code == 200


def test_stopping_is_clean(tmp_path: Path) -> None:
    gateway = LiveGateway(tmp_path / "data", fresh=True)
    gateway.start()

    assert gateway.stop() == 0


def test_a_busy_port_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = command(
            "serve", "--port", str(port), "--data-dir", str(tmp_path / "d")
        )

    assert answer.code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in answer.err
    assert answer.err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    answer = command("serve", "--port", "0", "--data-dir", str(tmp_path / "file" / "d"))

    assert answer.code == 1
    assert "cannot write to the data folder" in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_said_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    answer = command("serve", "--port", "0", "--data-dir", str(tmp_path / "d"))

    assert answer.code == 1


def test_a_second_gateway_on_the_same_folder_is_refused(gateway: LiveGateway) -> None:
    answer = command("serve", "--port", "0", "--data-dir", str(gateway.data_dir))

    assert answer.code == 1
    assert "another gateway already runs" in answer.err
    assert "PostgreSQL" in answer.err


def test_everything_wrong_with_a_config_is_said_at_once(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text('[server]\nprot = 8080\nhost = 7\n[credits]\nper_usd = "68"\n')

    answer = command("serve", "--config", str(config), "--data-dir", str(tmp_path))

    assert answer.code == 78
    for path in ("server.prot", "server.host", "credits.per_usd"):
        assert path in answer.err


def test_a_config_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    answer = command("check", "--config", str(tmp_path / "none.toml"))

    assert answer.code == 78
    assert "none.toml" in answer.err


def test_the_shipped_config_is_fine() -> None:
    answer = command("check", "--config", str(ROOT / "config" / "gateway.toml"))

    assert answer.code == 0
    assert "left out: openai" in answer.out
    assert "ok: 3 upstreams, 15 offers" in answer.out


def test_what_has_ended_or_grown_old_is_warned_of_and_starts(tmp_path: Path) -> None:
    shipped = ROOT / "config"
    catalogue = (shipped / "catalogue.toml").read_text()
    catalogue = catalogue.replace('as_of = "2026-11"', 'as_of = "2024-01"')
    catalogue = catalogue.replace("sunset = 2026-12-01", "sunset = 2024-02-01")
    (tmp_path / "catalogue.toml").write_text(catalogue)
    config = tmp_path / "gateway.toml"
    config.write_text((shipped / "gateway.toml").read_text())

    answer = command("check", "--config", str(config), OPENAI_API_KEY="sk-test")

    assert answer.code == 0
    warned = [line for line in answer.out.splitlines() if line.startswith("warning: ")]
    assert sum("over 180 days ago" in line for line in warned) == 5
    assert (
        "warning: openai/gpt-image-1.5 ended on 2024-02-01 and is never used; "
        "gpt-image-2 is to follow"
    ) in warned


def test_with_an_openai_key_openai_is_used_for_real() -> None:
    answer = command("routes", "explain", "--json", OPENAI_API_KEY="sk-test")

    assert [c["offer"] for c in answer.json] == ["openai/gpt-image-2"]


def test_the_estimate_of_the_command_is_that_of_the_route(gateway: LiveGateway) -> None:
    asked = {"model": "gpt-image-2", "size": "21:9", "resolution": "4K", "n": 3}
    with gateway.client() as client:
        by_route = client.post("/v1/estimate", json=asked).json()
    by_command = gateway.cli(
        *("estimate", "--size", "21:9", "--resolution", "4K", "--n", "3", "--json")
    ).json

    assert by_command == by_route
    assert by_route["high"]["tokens"]["image_output"] == 3 * 2099


@pytest.mark.parametrize(
    "amount",
    ["-1", "1e3", "NaN", "0.0000000001", "1,5", "", "99999999999", "0x10", "\u0661"],
)
def test_amounts_that_are_no_plain_decimals_are_refused(
    tmp_path: Path, amount: str
) -> None:
    answer = command(
        *("tenants", "create", "t", f"--credits={amount}", "--data-dir", str(tmp_path))
    )

    assert answer.code == 1
    assert answer.err.startswith("imageway: credits must be")


def test_a_tenant_is_made_once(tmp_path: Path) -> None:
    args = ("tenants", "create", "acme", "--credits", "5", "--data-dir", str(tmp_path))

    first, second = command(*args), command(*args)

    assert (first.code, second.code) == (0, 1)
    listed = command("tenants", "list", "--json", "--data-dir", str(tmp_path))
    assert [row["available"] for row in listed.json] == ["5"]


def test_a_grant_with_the_same_reference_is_given_once(tmp_path: Path) -> None:
    where = ("--data-dir", str(tmp_path))
    command("tenants", "create", "acme", *where)
    grant = ("credits", "grant", "--tenant", "acme", "--reference", "invoice 7", "2.5")

    for _ in range(3):
        assert command(*grant, *where).code == 0

    balance = command("credits", "balance", "--tenant", "acme", "--json", *where)
    assert balance.json == {"available": "2.5", "held": "0", "spent": "0"}


def test_the_healthcheck_tells_a_live_gateway_from_none(gateway: LiveGateway) -> None:
    assert command("healthcheck", "--url", gateway.url).code == 0
    gateway.stop()
    assert command("healthcheck", "--url", gateway.url).code == 1


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    full = LiveGateway(tmp_path / "data", log_file=Path("/dev/full"))
    with full as gateway, gateway.client() as client:
        made = client.post("/v1/images/generations", json={"prompt": "a fox"})
        refused = client.post("/v1/images/generations", json={"prompt": ""})
        lost = gateway.metric("imageway_log_lines_dropped")

        assert (made.status_code, refused.status_code) == (200, 400)
        assert lost[""] > 0
        assert gateway.balance("first")["held"] == "0"


def test_an_audit_of_a_folder_without_books_is_refused(tmp_path: Path) -> None:
    answer = command("audit", "--data-dir", str(tmp_path / "typo"))

    assert answer.code == 1
    assert "there is no database" in answer.err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("setting", ["REDIS=redis://h:1?db=x"])
def test_storage_that_is_not_there_yet_is_refused(tmp_path: Path, setting: str) -> None:
    name, _, value = setting.partition("=")
    env = {f"IMAGEWAY__STORAGE__{name}": value}

    for what in (("check",), ("serve", "--port", "0", "--data-dir", str(tmp_path))):
        answer = command(*what, cwd=None, **env)
        assert answer.code == 1
        assert f"storage.{name.lower()}" in answer.err
