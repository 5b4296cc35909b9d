"""Work that is never cut short: the kernel goes on with what it was asked, whether or not anybody still waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. A caller that is cancelled waits for its end too, and only then is cancelled.

    So whatever comes next (an undo, the next call of the same key) never meets a kernel that is still busy with `work`.
    """
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    if not cancelled:
        return task.result()
    if not task.cancelled() and (failure := task.exception()):
        log.warning("failed after its caller had gone", extra={"error": str(failure)})
    raise asyncio.CancelledError
