"""The socket that a gateway listens on, and the loop that it runs on."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from gateway.serving import event_loop, listen


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_connection_sends_without_waiting_for_the_clients_ack(host: str) -> None:
    with (
        listen(host, 0) as listening,
        socket.create_connection(listening.getsockname()[:2], timeout=5),
    ):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_gateway_runs_on_uvloop() -> None:
    with closing(event_loop()) as loop:
        assert type(loop).__module__.startswith("uvloop")
