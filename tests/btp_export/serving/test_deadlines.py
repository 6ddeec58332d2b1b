"""Steps that end in time, too late, with their caller, and in the moment in which their caller is cancelled."""

import asyncio

import pytest

from btp_export.serving.deadlines import within


async def never() -> None:
    await asyncio.Event().wait()


def test_a_step_in_time() -> None:
    async def three() -> int:
        await asyncio.sleep(0)
        return 3

    async def wrong() -> None:
        raise LookupError("wrong")

    assert asyncio.run(within(60, three())) == 3
    with pytest.raises(LookupError, match="wrong"):
        asyncio.run(within(60, wrong()))


def test_a_step_that_takes_too_long_is_cancelled() -> None:
    ended = []

    async def slow() -> None:
        try:
            await never()
        finally:
            await asyncio.sleep(0)  # what it has to put in order is waited for
            ended.append(True)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(within(0.01, slow()))
    assert ended == [True]


@pytest.mark.parametrize("outcome", ["nothing", "result", "error"])
def test_a_cancelled_caller_stays_cancelled(outcome: str) -> None:
    """Also when the step ends in the same turn of the loop."""

    async def cancelled() -> bool:
        step: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        caller = asyncio.ensure_future(within(60, step))
        await asyncio.sleep(0.01)
        if outcome == "result":
            step.set_result(3)
        if outcome == "error":
            step.set_exception(LookupError("wrong"))
        caller.cancel()
        await asyncio.wait({caller})
        return caller.cancelled() and step.done()

    assert asyncio.run(cancelled())
