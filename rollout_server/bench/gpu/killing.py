"""An engine is killed, and another one answers."""

import os
import signal

from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.scale import greedy, seconds
from rollout_server.completion import Completion
from rollout_server.server import RolloutServer


def killed(found: Findings, server: RolloutServer, whole: Completion) -> float:
    """Seconds from the engine's death to the next answer, which is checked.

    whole: the greedy completion of its prompt.
    """
    pid = server.engine_pid
    after: list[Completion] = []

    def work() -> None:
        os.kill(pid, signal.SIGKILL)
        after.append(greedy(server, whole.prompt_ids, len(whole.ids)))

    taken = seconds(work)
    found.check("another engine answers", server.engine_pid != pid)
    same = after[0].ids == whole.ids
    found.check("it answers as the one that died", same, f"{after[0].ids} after {whole.ids}")
    with found.step("it has the policy's weights"):
        server.verify_weights()
    return taken
