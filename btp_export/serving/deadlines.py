"""A step of a request that may take only so long, and that ends with its caller."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


async def within(seconds: float, step: Awaitable[Result]) -> Result:
    """What a step gives. Raises asyncio.TimeoutError after `seconds`; the step is cancelled then.

    The step is cancelled with its caller too, also when it ends in that very moment: `asyncio.wait_for` of Python 3.10
    and 3.11 gives the result then and forgets the cancellation, so a request whose client has gone would be answered.
    """
    task = asyncio.ensure_future(step)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody else asks for it, and asyncio would write that it was lost
