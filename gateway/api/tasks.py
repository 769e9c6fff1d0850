"""``/v1/tasks/{id}``: what became of a request."""

from __future__ import annotations

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from gateway.api.admin import AdminGate
from gateway.api.http import AnyRequest, note_of
from gateway.api.links import Links
from gateway.api.render import Renderer
from gateway.flows.keys import Authenticate
from gateway.flows.tasks import ReadTask


def task_routes(
    authenticate: Authenticate,
    admin: AdminGate,
    read_task: ReadTask,
    links: Links,
    renderer: Renderer,
) -> list[HTTPRouteHandler]:
    """Route the tasks."""

    @get("/v1/tasks/{task_id:str}")
    async def get_task(request: AnyRequest, task_id: str) -> Response[bytes]:
        """Return a task to its tenant; to an admin with its route and attempts."""
        authorization = request.headers.get("authorization")
        link_to = links.to(request.scope)
        note = note_of(request.scope)
        if admin.opens(authorization):
            view = await read_task(task_id, None)
            body = renderer.admin(view, link_to)
        else:
            key = await authenticate(authorization)
            note.tenant_id, note.key_id = key.tenant_id, key.id
            view = await read_task(task_id, key.tenant_id)
            body = renderer.task(view, link_to)
        note.task_id = view.id
        return Response(msgspec.json.encode(body), media_type="application/json")

    return [get_task]
