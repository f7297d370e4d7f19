"""Sessions take turns at the engine."""

import asyncio

from rollout_server.http.middleware.admission import AdmissionQueue


async def test_sessions_take_turns():
    """A thousand requests of one session aren't all in front of another's single one."""
    admission, order = AdmissionQueue(2), []

    async def ask(owner, number):
        await admission.enter(owner)
        order.append((owner, number))
        await asyncio.sleep(0)
        admission.leave()

    many = [asyncio.ensure_future(ask("greedy", i)) for i in range(1000)]
    await asyncio.sleep(0)
    assert (admission.running, admission.queued) == (2, 998)
    few = [asyncio.ensure_future(ask(owner, 0)) for owner in ("a", "b", None)]
    await asyncio.gather(*many, *few)
    at = [order.index((owner, 0)) for owner in ("a", "b", None)]
    assert max(at) <= 2 + 2 * 3
    assert [n for owner, n in order if owner == "greedy"] == [*range(1000)]  # each in its order
    assert (admission.running, admission.queued) == (0, 0)


async def test_a_turn_is_not_lost_with_who_leaves():
    admission = AdmissionQueue(1)
    await admission.enter("a")
    waiting = [asyncio.ensure_future(admission.enter(owner)) for owner in "bcd"]
    await asyncio.sleep(0)
    waiting[0].cancel()  # while it waits
    await asyncio.sleep(0)
    admission.leave()
    waiting[1].cancel()  # at the moment when it is let in
    await asyncio.gather(*waiting, return_exceptions=True)
    assert waiting[2].done() and not waiting[2].cancelled()
    assert (admission.running, admission.queued) == (1, 0)
    admission.leave()
    assert admission.running == 0
