"""What keys have used, in SQL: counted with each hold of a key that has a budget.

Whoever changes a count has the tenant's account locked: what is read after that stands
until the transaction is over. Keys that are not counted cost nothing here; what they
used before is in the holds, and is taken over when they get a budget.
"""

from __future__ import annotations

from functools import lru_cache

from gateway.adapters.sql.database import Change, Transaction
from gateway.core.key_limits import TOTAL, KeyLimits, KeyUse, check_hold, month_of

USE = """SELECT k.meter_id, k.counted,
    CASE p.kind WHEN 0 THEN 'total' WHEN 1 THEN h.day ELSE substr(h.day, 1, 7) END
        AS period,
    COALESCE(s.charged, h.nanocredits) AS nanocredits,
    CASE WHEN s.task_id IS NULL THEN 1 ELSE 0 END AS open_tasks
FROM keys k JOIN holds h ON h.key_id = k.id
LEFT JOIN settlements s ON s.task_id = h.task_id
CROSS JOIN (SELECT 0 AS kind UNION ALL SELECT 1 UNION ALL SELECT 2) p"""
"""What every hold adds to the use of its meter, out of the rows themselves."""


async def check_counted(
    tx: Transaction, today: str, key_id: str, nanocredits: int
) -> tuple[str, str] | None:
    """See that a key may hold so much more; a part of a larger transaction.

    Returns its meter and the day, for ``counting``; None if it is not counted.

    Raises:
        InsufficientCreditsError: it would be more than a budget.
        RateLimitedError: as many of its tasks are in flight as may.
    """
    row = await tx.one(_look(today), key_id)
    if row is None:
        return None
    meter, day, concurrent_tasks, total, daily, monthly, *used = row
    limits = KeyLimits(
        concurrent_tasks=concurrent_tasks,
        total_nanocredits=total,
        daily_nanocredits=daily,
        monthly_nanocredits=monthly,
    )
    check_hold(limits, KeyUse(day, *used), nanocredits)
    return meter, day


@lru_cache(maxsize=2)
def _look(today: str) -> str:
    return f"""SELECT k.meter_id, d.day, k.concurrent_tasks,
        k.total_budget, k.daily_budget, k.monthly_budget,
        COALESCE(t.open_tasks, 0), COALESCE(t.nanocredits, 0),
        COALESCE(y.nanocredits, 0), COALESCE(m.nanocredits, 0)
    FROM keys k CROSS JOIN (SELECT {today} AS day) d
    LEFT JOIN key_use t ON t.meter_id = k.meter_id AND t.period = 'total'
    LEFT JOIN key_use y ON y.meter_id = k.meter_id AND y.period = d.day
    LEFT JOIN key_use m ON m.meter_id = k.meter_id AND m.period = substr(d.day, 1, 7)
    WHERE k.id = $1 AND k.counted = 1"""  # noqa: S608 - an expression of the engine's


def counting(counted: tuple[str, str] | None, nanocredits: int) -> list[Change]:
    """Write a hold down in the use of its meter, by all time, day and month."""
    if counted is None:
        return []
    meter, day = counted
    return [
        (
            """INSERT INTO key_use (meter_id, period, nanocredits, open_tasks)
            VALUES ($1, $2, $3, 1) ON CONFLICT (meter_id, period) DO UPDATE SET
                nanocredits = key_use.nanocredits + excluded.nanocredits,
                open_tasks = key_use.open_tasks + 1""",
            meter,
            period,
            nanocredits,
        )
        for period in (TOTAL, day, month_of(day))
    ]


def settling(meter: str | None, day: str, more_nanocredits: int) -> list[Change]:
    """Write down that a hold was settled, for so much more or less than it held."""
    if meter is None:
        return []
    return [
        (
            """UPDATE key_use SET nanocredits = nanocredits + $5,
                open_tasks = open_tasks - 1
            WHERE meter_id = $1 AND period IN ($2, $3, $4)""",
            meter,
            TOTAL,
            day,
            month_of(day),
            more_nanocredits,
        )
    ]


async def count_or_not(tx: Transaction, tenant_id: str, meter: str) -> None:
    """Begin or end counting a meter, as the limits of its keys now ask for.

    The tenant's account is locked, so no hold is between these two states.
    """
    row = await tx.one(
        """SELECT MAX(counted), MAX(CASE WHEN concurrent_tasks IS NULL
            AND total_budget IS NULL AND daily_budget IS NULL
            AND monthly_budget IS NULL THEN 0 ELSE 1 END)
        FROM keys WHERE meter_id = $1""",
        meter,
    )
    assert row is not None
    is_counted, is_to_be = row
    if is_counted == is_to_be:
        # A key that came by rotation may not say so yet.
        await tx.run(
            "UPDATE keys SET counted = $2 WHERE meter_id = $1", meter, is_to_be
        )
        return
    await tx.run("DELETE FROM key_use WHERE meter_id = $1", meter)
    if is_to_be:
        await tx.run(
            f"""INSERT INTO key_use (meter_id, period, nanocredits, open_tasks)
            SELECT meter_id, period, CAST(SUM(nanocredits) AS BIGINT), SUM(open_tasks)
            FROM ({USE} WHERE k.meter_id = $1) u GROUP BY meter_id, period""",  # noqa: S608 - a constant
            meter,
        )
        await tx.run(
            """UPDATE accounts SET keys_version = keys_version + 1
            WHERE tenant_id = $1""",
            tenant_id,
        )
    await tx.run("UPDATE keys SET counted = $2 WHERE meter_id = $1", meter, is_to_be)


async def read_use(tx: Transaction, today: str, key_id: str) -> KeyUse | None:
    """Tell what the meter of a key has used: as counted, else out of all its rows."""
    counted = await tx.one(_look(today), key_id)
    if counted is not None:
        return KeyUse(counted[1], *counted[6:])
    found = await tx.one(
        f"SELECT meter_id, {today} FROM keys WHERE id = $1",  # noqa: S608 - as above
        key_id,
    )
    if found is None:
        return None
    meter, day = found
    rows = await tx.all(
        f"""SELECT period, CAST(SUM(nanocredits) AS BIGINT), SUM(open_tasks)
        FROM ({USE} WHERE k.meter_id = $1) u
        WHERE period IN ('total', $2, $3) GROUP BY period""",  # noqa: S608 - a constant
        meter,
        day,
        month_of(day),
    )
    by_period = {period: (used, tasks) for period, used, tasks in rows}
    used, tasks = by_period.get(TOTAL, (0, 0))
    today_used, _ = by_period.get(day, (0, 0))
    month_used, _ = by_period.get(month_of(day), (0, 0))
    return KeyUse(day, tasks, used, today_used, month_used)


DRIFT = f"""SELECT meter_id || ' ' || period || ', tasks in flight: '
        || SUM(tasks_expected) || ' expected, ' || SUM(tasks_found) || ' found',
    CAST(SUM(expected) AS BIGINT), CAST(SUM(found) AS BIGINT)
FROM (
    SELECT meter_id, period, nanocredits AS expected, 0 AS found,
        open_tasks AS tasks_expected, 0 AS tasks_found
    FROM ({USE} WHERE k.counted = 1) e
    UNION ALL
    SELECT meter_id, period, 0, nanocredits, 0, open_tasks FROM key_use
) x GROUP BY meter_id, period
HAVING SUM(expected) <> SUM(found) OR SUM(tasks_expected) <> SUM(tasks_found)"""  # noqa: S608 - constants
"""What of the counts is not what the rows say, as the audit has it."""
