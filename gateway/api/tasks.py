"""``/v1/tasks/{id}``: what became of a request."""

from __future__ import annotations

import msgspec
from litestar import Response, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from gateway.api.admin import AdminGate
from gateway.api.door import key_of
from gateway.api.http import AnyRequest, note_of, read_json, whole_number
from gateway.api.links import Links
from gateway.api.render import Renderer
from gateway.core.errors import InvalidRequestError
from gateway.core.key_limits import KeyScope
from gateway.core.tasks import TaskState
from gateway.flows.keys import Authenticate
from gateway.flows.tasks import (
    BATCH_MAX_TASKS,
    PAGE_MAX_TASKS,
    ManageTasks,
    ReadTask,
)
from gateway.ports import Key, TaskFilter

PAGE_TASKS = 20
PAGE_MAX = 1_000_000


def task_routes(
    authenticate: Authenticate,
    admin: AdminGate,
    read_task: ReadTask,
    manage: ManageTasks,
    links: Links,
    renderer: Renderer,
) -> list[HTTPRouteHandler]:
    """Route the tasks."""

    @get("/v1/tasks/{task_id:str}")
    async def get_task(request: AnyRequest, task_id: FromPath[str]) -> Response[bytes]:
        """Return a task to its tenant; to an admin with its route and attempts."""
        link_to = links.to(request.scope)
        note = note_of(request.scope)
        if admin.opens(request.headers.get("authorization")):
            view = await read_task(task_id, None)
            body = renderer.admin(view, link_to)
        else:
            key = await _key(authenticate, request)
            view = await read_task(task_id, key.tenant_id)
            body = renderer.task(view, link_to)
        note.task_id = view.id
        return Response(msgspec.json.encode(body), media_type="application/json")

    @get("/v1/tasks")
    async def list_tasks(request: AnyRequest) -> Response[bytes]:
        """List the tenant's tasks, newest first."""
        key = await _key(authenticate, request)
        query = request.query_params
        page = whole_number(query.get("page"), "page", default=1, at_most=PAGE_MAX)
        size = whole_number(
            query.get("page_size"),
            "page_size",
            default=PAGE_TASKS,
            at_most=PAGE_MAX_TASKS,
        )
        wanted = TaskFilter(_states(query.get("status")), query.get("model") or None)
        total, listed = await manage.page(
            key.tenant_id, wanted, page=page, page_size=size
        )
        data = [renderer.line(each) for each in listed]
        return _json({"data": data, "total": total, "page": page, "page_size": size})

    @post("/v1/tasks/batch", status_code=200)
    async def batch_tasks(request: AnyRequest) -> Response[bytes]:
        """Return several tasks at once; unknown ids are left out."""
        key = await _key(authenticate, request)
        ids = _task_ids(await read_json(request.receive))
        views = await manage.batch(key.tenant_id, ids)
        link_to = links.to(request.scope)
        return _json({"data": [renderer.task(view, link_to) for view in views]})

    @post("/v1/tasks/{task_id:str}/cancel", status_code=200)
    async def cancel_task(
        request: AnyRequest, task_id: FromPath[str]
    ) -> Response[bytes]:
        """Cancel a task."""
        key = await _key(authenticate, request)
        view = await manage.cancel(task_id, key.tenant_id)
        note_of(request.scope).task_id = view.id
        return _json(renderer.task(view, links.to(request.scope)))

    return [get_task, list_tasks, batch_tasks, cancel_task]


async def _key(authenticate: Authenticate, request: AnyRequest) -> Key:
    return await key_of(authenticate, request.scope, KeyScope.TASKS)


def _states(text: str | None) -> tuple[TaskState, ...]:
    if not text:
        return ()
    known: dict[str, tuple[TaskState, ...]] = {s.value: (s,) for s in TaskState}
    known["processing"] = (TaskState.PENDING, TaskState.PROCESSING)
    if text not in known:
        raise InvalidRequestError(
            f"status must be one of {', '.join(known)}.", param="status"
        )
    return known[text]


def _task_ids(body: object) -> list[str]:
    ids = body.get("task_ids") if isinstance(body, dict) else None
    listed = ids if isinstance(ids, list) else []
    texts = [each for each in listed if isinstance(each, str)]
    if not 1 <= len(texts) == len(listed) <= BATCH_MAX_TASKS:
        raise InvalidRequestError(
            f"task_ids must be an array of 1 to {BATCH_MAX_TASKS} task ids.",
            param="task_ids",
        )
    return texts


def _json(body: dict[str, object]) -> Response[bytes]:
    return Response(msgspec.json.encode(body), media_type="application/json")
