"""Every adapter there is, by the ``kind`` that a config names. One line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from providers import (
    azure,
    fal,
    openai,
    openrouter,
    replicate,
    sandbox,
    task_api,
)
from providers.kit.contract import Account, Provider
from providers.kit.wire import Tools

PROVIDERS: Mapping[str, Callable[[Account, Tools], Provider]] = {
    "azure": azure.connect,
    "fal": fal.connect,
    "openai": openai.connect,
    "openrouter": openrouter.connect,
    "replicate": replicate.connect,
    "sandbox": sandbox.connect,
    "task_api": task_api.connect,
}
