"""What commands ask without a running gateway."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from gateway.adapters.clock import SystemClock
from gateway.adapters.data_dir import DataDir
from gateway.api.estimate import estimate_body
from gateway.api.render import route_facts
from gateway.app.edition import connect_providers
from gateway.books import check_storage, open_shelves
from gateway.core.catalogue import Catalogue
from gateway.core.pricing import cost_rule
from gateway.core.requests import parse_generation
from gateway.core.routing import Moment, decide
from gateway.flows.dispatch import candidate_facts
from gateway.flows.generate import SYNC_DEADLINE_MS, wish_of
from gateway.flows.probe import Probe, probe_all
from gateway.ports import TaskRecord
from gateway.settings import Settings


def checked_catalogue(settings: Settings) -> Catalogue:
    """Build the catalogue as a gateway would.

    Raises:
        StartError: an upstream's options, or where to store, cannot be used.
    """
    check_storage(settings)
    providers, _, catalogue = connect_providers(
        settings, DataDir(settings.storage.data_dir).spool
    )
    del providers
    return catalogue


def _today() -> str:
    moment = datetime.fromtimestamp(SystemClock().now_ms() / 1000, UTC)
    return moment.date().isoformat()


async def probed(settings: Settings) -> list[Probe]:
    """Test the credential of each upstream in use with a free call.

    Raises:
        StartError: an upstream's options are wrong.
    """
    providers, wire, _ = connect_providers(
        settings, DataDir(settings.storage.data_dir).spool
    )
    models: dict[str, str] = {}
    for offer in settings.offers:
        models.setdefault(offer.upstream, offer.model)
    try:
        return await probe_all(providers, models)
    finally:
        for provider in providers.values():
            await provider.close()
        await wire.close()


async def probed_store(settings: Settings) -> str | None:
    """Ask the object store for a list; tells what is wrong with it, or None.

    Nothing is written, and nothing is asked where pictures are on the disk.
    """
    data_dir = DataDir(settings.storage.data_dir)
    shelves = open_shelves(settings.storage, data_dir, secret=b"")
    return await shelves.glance() if shelves.glance else None


def estimated(settings: Settings, body: object) -> dict[str, object]:
    """Price a request body, as ``POST /v1/estimate`` does."""
    catalogue = Catalogue(variants=settings.variants, offers={})
    return estimate_body(body, catalogue, settings.nanocredits_per_usd)


def route_of(settings: Settings, body: object) -> list[dict[str, object]]:
    """Tell where a fresh gateway would send a request body."""
    catalogue = checked_catalogue(settings)
    request = parse_generation(body, catalogue, prompt_optional=True)
    cost_nanousd = cost_rule(request)
    priced = [
        (offer, cost_nanousd(offer, request.n))
        for offer in catalogue.offers[request.variant.name]
    ]
    moment = Moment(_today(), SYNC_DEADLINE_MS)
    decision = decide(wish_of(request), priced, {}, moment)
    return [candidate_facts(candidate, decision) for candidate in decision.all]


def explained(record: TaskRecord) -> dict[str, object]:
    """Show a stored decision and its attempts."""
    return {
        "task_id": record.id,
        "variant": record.variant,
        "state": record.state.value,
        **route_facts(record),
    }


def as_json(body: dict[str, object]) -> str:
    """Encode a body that holds exact numbers."""
    return msgspec.json.encode(body).decode()
