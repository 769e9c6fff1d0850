"""The composition root: the only place where flows meet adapters.

``standing`` is what a process keeps whatever its configuration becomes, ``edition``
what is made of one configuration, ``running`` both together as a gateway that serves.
``offline`` answers what commands ask without a running gateway.
"""

from gateway.app.edition import connect_providers, read_settings, routed
from gateway.app.offline import (
    as_json,
    checked_catalogue,
    estimated,
    explained,
    probed,
    probed_store,
    route_of,
)
from gateway.app.running import Gateway, build_gateway, started

__all__ = [
    "Gateway",
    "as_json",
    "build_gateway",
    "checked_catalogue",
    "connect_providers",
    "estimated",
    "explained",
    "probed",
    "probed_store",
    "read_settings",
    "route_of",
    "routed",
    "started",
]
