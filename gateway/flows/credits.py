"""Who owns credits and how many: tenants, grants, refunds, prices, balances."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gateway.core.addresses import ForbiddenUrlError
from gateway.core.errors import InvalidRequestError, NotFoundError
from gateway.core.fleet import Notice, Topic
from gateway.core.key_limits import KeyUse, left_nanocredits
from gateway.core.ledger import Balance
from gateway.core.money import decimal_text
from gateway.core.statements import LAST_MS, Cursor, moment_or_none, moment_text
from gateway.core.terms import Terms, amount_nano, parse_cards, parse_multiplier
from gateway.core.webhooks import CallbackRules, callback_url
from gateway.ports import (
    Accounts,
    Chance,
    Clock,
    GrantRecord,
    Key,
    LowBalance,
    Mark,
    NewGrant,
    NewRefund,
    Tenant,
    TenantRecord,
    Tenants,
    Trace,
    Treasury,
)

TENANT_NAME_MAX_CHARS = 64
ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
ID_CHARS = 16
_NOTHING_USED = KeyUse("1970-01-01")
REFERENCE_MAX_CHARS = 128
NOTE_MAX_CHARS = 500
EXPIRE_AT_ONCE = 500
SETTINGS = ("price_multiplier", "prices", "low_balance")
"""What of a tenant can be changed, beside suspending it."""
LOW_FACTS = ("credits", "url", "key_id")


async def _tell_nobody(notice: Notice) -> None:
    del notice


@dataclass(frozen=True, slots=True)
class ManageTenants:
    """Makes tenants, changes them, and gives them credits.

    ``who`` is what the audit trail says of each change. ``announce`` tells running
    gateways that keys are to be read anew, as far as they can be reached.
    """

    accounts: Accounts
    ledger: Treasury
    tenants: Tenants
    clock: Clock
    chance: Chance
    announce: Callable[[Notice], Awaitable[None]] = _tell_nobody
    who: str = "imageway"
    callback_rules: CallbackRules = field(default_factory=CallbackRules)

    def acting_as(self, who: str) -> ManageTenants:
        """Return the same for somebody else."""
        return replace(self, who=who)

    async def create(self, name: str, *, nanocredits: int = 0) -> Tenant:
        """Make a tenant with a first grant.

        Raises:
            InvalidRequestError: the name is empty, too long or not printable.
            ConflictError: the name is taken.
        """
        if not 1 <= len(name) <= TENANT_NAME_MAX_CHARS or not name.isprintable():
            raise InvalidRequestError(
                f"A tenant's name has 1 to {TENANT_NAME_MAX_CHARS} printable "
                "characters.",
                param="name",
            )
        tenant = Tenant(id="ten_" + self.chance.token(ID_ALPHABET, ID_CHARS), name=name)
        await self.tenants.add(tenant, self._mark())
        if nanocredits:
            await self.grant(tenant, nanocredits, reference="first grant")
        return tenant

    async def named(self, name: str) -> Tenant:
        """Find a tenant by name.

        Raises:
            NotFoundError: there is none of that name.
        """
        tenant = await self.accounts.tenant_named(name)
        if tenant is None:
            raise _no_tenant(name)
        return tenant

    async def record(self, tenant: str) -> TenantRecord:
        """Read all of a tenant, found by id or name.

        Raises:
            NotFoundError: there is none.
        """
        # What no name can be need not be looked for: some stores would refuse it.
        known = tenant.isprintable()
        record = await self.tenants.record(tenant) if known else None
        if record is None:
            raise _no_tenant(tenant)
        return record

    async def page(
        self, *, offset: int, limit: int
    ) -> tuple[int, Sequence[TenantRecord]]:
        """List tenants by name, with their number."""
        return await self.tenants.page(offset=offset, limit=limit)

    async def suspend(self, tenant_id: str) -> TenantRecord:
        """Take nothing new for a tenant; what runs is finished and settled.

        Raises:
            NotFoundError: there is no such tenant.
        """
        now_ms = self.clock.now_ms()

        def suspended(record: TenantRecord) -> TenantRecord:
            since_ms = record.suspended_ms
            return replace(
                record, suspended_ms=now_ms if since_ms is None else since_ms
            )

        return await self._changed(tenant_id, "tenant.suspend", suspended)

    async def resume(self, tenant_id: str) -> TenantRecord:
        """Let a suspended tenant go on.

        Raises:
            NotFoundError: there is no such tenant.
        """
        return await self._changed(
            tenant_id,
            "tenant.resume",
            lambda record: replace(record, suspended_ms=None),
        )

    async def change(
        self, tenant_id: str, given: Mapping[str, object], models: Collection[str]
    ) -> TenantRecord:
        """Change what is given of ``SETTINGS``; None takes it away.

        Args:
            tenant_id: whose.
            given: as the admin API has it.
            models: the names of all variants.

        Raises:
            InvalidRequestError: it breaks a rule; nothing was changed.
            NotFoundError: there is no such tenant, or it has no such key.
        """
        strange = sorted(set(given) - set(SETTINGS))
        if strange or not given:
            raise InvalidRequestError(
                f"The body may have {', '.join(SETTINGS)}, and must have one of them.",
                param=strange[0][:64] if strange else None,
            )
        multiplier = given.get("price_multiplier")
        millionths = parse_multiplier("1" if multiplier is None else multiplier)
        cards = parse_cards(given.get("prices"), models)
        low = await self._low(tenant_id, given.get("low_balance"))

        def changed(record: TenantRecord) -> TenantRecord:
            terms = record.terms
            by = millionths if "price_multiplier" in given else None
            return replace(
                record,
                terms=Terms(
                    terms.multiplier_millionths if by is None else by,
                    cards if "prices" in given else terms.cards,
                ),
                low=low if "low_balance" in given else record.low,
            )

        return await self._changed(tenant_id, "tenant.change", changed)

    async def _low(self, tenant_id: str, given: object) -> LowBalance | None:
        if given is None:
            return None
        if not isinstance(given, dict) or set(given) - set(LOW_FACTS):
            raise InvalidRequestError(
                f"low_balance must be an object of {', '.join(LOW_FACTS)}.",
                param="low_balance",
            )
        nanocredits = amount_nano(given.get("credits"), "low_balance.credits")
        if not nanocredits:
            raise InvalidRequestError(
                "low_balance.credits must be above 0.", param="low_balance.credits"
            )
        url = given.get("url")
        if not isinstance(url, str):
            raise InvalidRequestError(
                "low_balance.url must be an https URL.", param="low_balance.url"
            )
        try:
            callback_url(url, self.callback_rules)
        except ForbiddenUrlError as error:
            raise InvalidRequestError(
                f"low_balance.url is not accepted. {error}",
                param="low_balance.url",
                code="invalid_callback_url",
            ) from error
        key_id = await self._signing_key_id(tenant_id, given.get("key_id"))
        return LowBalance(nanocredits, url, key_id)

    async def _signing_key_id(self, tenant_id: str, given: object) -> str:
        keys = await self.accounts.keys(tenant_id)
        ids = [key.id for key in keys if key.revoked_ms is None]
        if given is None and ids:
            return ids[0]
        if isinstance(given, str) and given in ids:
            return given
        raise NotFoundError(
            "low_balance.key_id must be an API key of the tenant: its webhook secret "
            "signs what is sent.",
            param="low_balance.key_id",
            code="key_not_found",
        )

    async def grant(
        self,
        tenant: Tenant,
        nanocredits: int,
        *,
        reference: str | None = None,
        expires_ms: int | None = None,
        note: str | None = None,
    ) -> Balance:
        """Add credits. The same ``reference`` again changes nothing.

        What is left of them at ``expires_ms`` is taken back.

        Raises:
            InvalidRequestError: the amount is not above zero, or a text is too long.
            ConflictError: the reference was used for another grant.
        """
        if nanocredits <= 0:
            raise InvalidRequestError("A grant must be above zero.", param="credits")
        mark = self._mark()
        if reference is None:
            reference = "grant " + self.chance.token(ID_ALPHABET, ID_CHARS)
        if expires_ms is not None and not mark.at_ms < expires_ms <= LAST_MS:
            # One that was made before may be asked for again once it is over.
            await self._check_known(tenant.id, reference)
        check_texts(reference, note)
        return await self.ledger.give(
            NewGrant(tenant.id, nanocredits, reference, expires_ms, note), mark
        )

    async def _check_known(self, tenant_id: str, reference: str) -> None:
        if not await self.ledger.knows_grant(tenant_id, reference):
            raise InvalidRequestError(
                "expires_at must be in the future.", param="expires_at"
            )

    async def grants(
        self, tenant_id: str, *, offset: int, limit: int
    ) -> Sequence[GrantRecord]:
        """List a tenant's grants, newest first."""
        return await self.ledger.grants(tenant_id, offset=offset, limit=limit)

    async def refund(
        self,
        tenant: Tenant,
        task_id: str,
        *,
        nanocredits: int | None = None,
        reference: str | None = None,
        note: str | None = None,
    ) -> Balance:
        """Give back what a task was charged, or a part of it.

        The same ``reference`` again changes nothing; without one a task is refunded
        once.

        Raises:
            InvalidRequestError: the amount is not above zero, or a text is too long.
            NotFoundError: the tenant has no such task.
            ConflictError: that is more than is left of the charge, or the reference
                was used for another refund.
        """
        if nanocredits is not None and nanocredits <= 0:
            raise InvalidRequestError("A refund must be above zero.", param="credits")
        if not task_id.isprintable():
            raise NotFoundError(
                "There is no such task.", param="task_id", code="task_not_found"
            )
        reference = reference or f"refund of {task_id}"
        check_texts(reference, note)
        asked = NewRefund(tenant.id, task_id, reference, nanocredits, note)
        return await self.ledger.refund(asked, self._mark())

    async def balance(self, tenant_id: str) -> Balance:
        """Read what a tenant has."""
        return await self.ledger.balance(tenant_id) or Balance()

    async def use_of(self, key: Key) -> KeyUse | None:
        """Read what a key has used; None for one that has no budget to use up."""
        has_budget = left_nanocredits(key.limits, _NOTHING_USED) is not None
        return await self.accounts.key_use(key.id) if has_budget else None

    async def trail(
        self, tenant_id: str | None, *, after: Cursor, limit: int
    ) -> Sequence[Trace]:
        """Read who changed what, newest first."""
        return await self.tenants.trail(tenant_id, after=after, limit=limit)

    async def expire_grants(self) -> int:
        """Take back what is left of grants that are over; returns of how many."""
        now_ms, taken = self.clock.now_ms(), 0
        while found := await self.ledger.expire(now_ms, EXPIRE_AT_ONCE):
            taken += len(found)
            if len(found) < EXPIRE_AT_ONCE:
                break
        return taken

    async def tell_low_balances(self) -> int:
        """Write webhooks for balances that fell below a threshold."""
        return await self.tenants.tell_low(self.clock.now_ms())

    async def _changed(
        self, tenant_id: str, what: str, change: Callable[[TenantRecord], TenantRecord]
    ) -> TenantRecord:
        record = await self.tenants.change(tenant_id, what, change, self._mark())
        if record is None:
            raise _no_tenant(tenant_id)
        await self.announce(Notice(Topic.KEYS, ""))
        return record

    def _mark(self) -> Mark:
        change_id = "chg_" + self.chance.token(ID_ALPHABET, ID_CHARS)
        return Mark(change_id, self.who, self.clock.now_ms())


def check_texts(reference: str, note: str | None) -> None:
    """See that a reference and a note can be kept and shown.

    Raises:
        InvalidRequestError: one is empty, too long or not printable.
    """
    if not 1 <= len(reference) <= REFERENCE_MAX_CHARS or not reference.isprintable():
        raise InvalidRequestError(
            f"reference must be 1 to {REFERENCE_MAX_CHARS} printable characters.",
            param="reference",
        )
    if note is not None and (len(note) > NOTE_MAX_CHARS or not note.isprintable()):
        raise InvalidRequestError(
            f"note may have {NOTE_MAX_CHARS} printable characters.", param="note"
        )


def _no_tenant(name: str) -> NotFoundError:
    return NotFoundError(
        f"There is no tenant {name[:TENANT_NAME_MAX_CHARS]!r}. See: imageway tenants "
        "list.",
        code="tenant_not_found",
    )


def balance_texts(balance: Balance) -> dict[str, str]:
    """Write a balance as decimal strings of credits: available, held, spent."""
    return {
        "available": decimal_text(balance.available),
        "held": decimal_text(balance.held),
        "spent": decimal_text(balance.spent),
    }


def tenant_facts(record: TenantRecord) -> dict[str, object]:
    """Write a tenant as JSON has it; credits as decimal texts."""
    return {
        "id": record.id,
        "name": record.name,
        "created_at": moment_text(record.created_ms),
        "state": "active" if record.suspended_ms is None else "suspended",
        **balance_texts(record.balance),
        **record.facts,
    }


def grant_facts(grant: GrantRecord) -> dict[str, str | None]:
    """Write a grant as JSON has it; credits as decimal texts.

    ``left`` is what is left of one that ends; None for one that does not.
    """
    left = grant.left_nanocredits
    return {
        "reference": grant.reference,
        "credits": decimal_text(grant.nanocredits),
        "created_at": moment_text(grant.created_ms),
        "expires_at": moment_or_none(grant.expires_ms),
        "note": grant.note,
        "left": None if left is None else decimal_text(left),
    }
