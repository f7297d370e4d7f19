"""Each request is counted and logged once, however it ended."""

import pytest
from support import PREFIX

from rollout_server.http.middleware.access_log import AccessLogMiddleware
from rollout_server.observability.events import Journal


@pytest.mark.parametrize(
    ("fails", "answers", "status"),
    [(None, True, "200"), (None, False, "499"), (RuntimeError, False, "500")],
)
async def test_how_a_request_ended_is_counted(fails, answers, status):
    """499: the client was gone before an answer began."""

    async def app(scope, receive, send):
        if answers:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if fails:
            raise fails

    async def send(message):
        sent.append(message)

    sent, journal = [], Journal()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    try:
        await AccessLogMiddleware(app, journal, lambda: 0)(scope, None, send)
    except RuntimeError:
        assert fails
    name = f'http_requests_total{{route="/v1/completions",status="{status}"}}'
    assert journal.metrics.values()[PREFIX + name] == 1
    assert [dict(m["headers"])[b"x-request-id"][:4] for m in sent] == [b"req-"] * answers
    assert len(journal.failures) == (status == "500")
