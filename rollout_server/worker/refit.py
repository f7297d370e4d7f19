"""A whole weight sync in one message to the engine core: rest, write, raise the version, go on.

The core calls methods of its own by the names that clients send; one more is put there, where the
worker is in its process. Runs between two steps of the engine, once what was under way has ended.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from rollout_server import vllm_compat as compat
from rollout_server.weights.wire import Failed, Message, Written, unpack_report
from rollout_server.worker import line


def install() -> bool:
    """Have the engine core of this process take such messages; whether it can."""
    kind = compat.core_that_refits()
    if kind is not None and not hasattr(kind, compat.REFIT):
        setattr(kind, compat.REFIT, _refit)
        line.install(kind, _refit)
    return kind is not None


def _refit(core: Any, message: Message | None, version: str) -> "list[bytes] | Future[list[bytes]]":
    """The workers' reports, packed; none where there is nothing to write. If one failed, the engine
    stays at rest, and has its old version."""

    def write() -> list[bytes]:
        reports = []
        if message is not None:
            reports = core.collective_rpc("rollout_write", args=(message,))
        if not any(isinstance(unpack_report(report, Written), Failed) for report in reports):
            core.set_weight_version(version)
            core.resume_scheduler()
        return reports

    def write_late() -> list[bytes]:
        reports = write()
        compat.wake_core(core)
        return reports

    resting = core.pause_scheduler("keep", True)
    return write() if resting is None else _then(resting, write_late)


def _then(before: "Future[Any]", work: Callable[[], Any]) -> "Future[Any]":
    """What `work` gives, which is done in the thread that ends `before`."""
    after: Future[Any] = Future()

    def go_on(ended: "Future[Any]") -> None:
        try:
            ended.result()
            after.set_result(work())
        except Exception as error:
            after.set_exception(error)

    before.add_done_callback(go_on)
    return after
