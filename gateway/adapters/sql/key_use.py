"""What keys have used, in SQL: counted with each hold of a key that has a budget.

Whoever changes a count has the tenant's account locked: what is read after that stands
until the transaction is over. Keys that are not counted cost nothing here; what they
used before is in holds and settlements, and is taken over when they get a budget.
"""

from __future__ import annotations

from functools import lru_cache

from gateway.adapters.sql.database import Change, Transaction
from gateway.core.key_limits import TOTAL, KeyLimits, KeyUse, check_hold, month_of

_USED = """SELECT u.day, CAST(SUM(u.nanocredits) AS BIGINT) AS nanocredits,
    CAST(SUM(u.open_tasks) AS BIGINT) AS open_tasks
FROM (
    SELECT s.day, s.charged AS nanocredits, 0 AS open_tasks
    FROM keys k JOIN settlements s ON s.key_id = k.id AND s.day IS NOT NULL
    WHERE k.meter_id = $1
    UNION ALL
    SELECT h.day, h.nanocredits, 1
    FROM (SELECT id FROM tasks WHERE finished_ms IS NULL
        ORDER BY created_ms, id LIMIT 1000000000) t
    JOIN holds h ON h.task_id = t.id JOIN keys k ON k.id = h.key_id
    WHERE k.meter_id = $1
) u GROUP BY u.day"""
"""What a meter has used, by day: of millions of rows it reads an index and those that
are still open."""


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
        for statement in _TAKING_OVER:
            await tx.run(statement, meter)
        await tx.run(
            """UPDATE accounts SET keys_version = keys_version + 1
            WHERE tenant_id = $1""",
            tenant_id,
        )
    await tx.run("UPDATE keys SET counted = $2 WHERE meter_id = $1", meter, is_to_be)


_TAKING_OVER = (
    f"""INSERT INTO key_use (meter_id, period, nanocredits, open_tasks)
    SELECT CAST($1 AS TEXT), v.day, v.nanocredits, v.open_tasks FROM ({_USED}) v""",  # noqa: S608 - a constant
    """INSERT INTO key_use (meter_id, period, nanocredits, open_tasks)
    SELECT meter_id, substr(period, 1, 7),
        CAST(SUM(nanocredits) AS BIGINT), CAST(SUM(open_tasks) AS BIGINT)
    FROM key_use WHERE meter_id = $1 GROUP BY meter_id, substr(period, 1, 7)""",
    """INSERT INTO key_use (meter_id, period, nanocredits, open_tasks)
    SELECT meter_id, 'total',
        CAST(SUM(nanocredits) AS BIGINT), CAST(SUM(open_tasks) AS BIGINT)
    FROM key_use WHERE meter_id = $1 AND length(period) = 10 GROUP BY meter_id""",
)


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
    rows = await tx.all(_USED, meter)
    today_used = sum(nano for at, nano, _ in rows if at == day)
    month_used = sum(nano for at, nano, _ in rows if month_of(at) == month_of(day))
    return KeyUse(
        day,
        open_tasks=sum(tasks for _, _, tasks in rows),
        total_nanocredits=sum(nano for _, nano, _ in rows),
        daily_nanocredits=today_used,
        monthly_nanocredits=month_used,
    )


DRIFT = """SELECT meter_id || ' ' || period || ', tasks in flight: '
        || SUM(tasks_expected) || ' expected, ' || SUM(tasks_found) || ' found',
    CAST(SUM(expected) AS BIGINT), CAST(SUM(found) AS BIGINT)
FROM (
    SELECT e.meter_id,
        CASE p.kind WHEN 0 THEN 'total' WHEN 1 THEN e.day
            ELSE substr(e.day, 1, 7) END AS period,
        e.nanocredits AS expected, 0 AS found,
        e.open_tasks AS tasks_expected, 0 AS tasks_found
    FROM (
        SELECT k.meter_id, h.day,
            SUM(COALESCE(s.charged, h.nanocredits)) AS nanocredits,
            SUM(CASE WHEN s.task_id IS NULL THEN 1 ELSE 0 END) AS open_tasks
        FROM holds h JOIN keys k ON k.id = h.key_id AND k.counted = 1
        LEFT JOIN settlements s ON s.task_id = h.task_id
        GROUP BY k.meter_id, h.day
    ) e CROSS JOIN (SELECT 0 AS kind UNION ALL SELECT 1 UNION ALL SELECT 2) p
    UNION ALL
    SELECT meter_id, period, 0, nanocredits, 0, open_tasks FROM key_use
) x GROUP BY meter_id, period
HAVING SUM(expected) <> SUM(found) OR SUM(tasks_expected) <> SUM(tasks_found)"""
"""What of the counts is not what holds and settlements say, as the audit has it."""
