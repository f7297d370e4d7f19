"""Small apps of the tests' own behind all layers, without an engine."""

import json

import httpx

from rollout_server.http.middleware.stack import layered
from rollout_server.http.sessions import Sessions
from rollout_server.lifecycle.gate import Gate
from rollout_server.trajectories.session import Session

KEY = "key-of-the-tests"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class House:
    """An app of a test behind all layers, with one session; `app` is the whole."""

    def __init__(
        self,
        app,
        gate=None,
        version=lambda: 7,
        names=("policy",),
        vocabulary=100,
        limits=None,
        **kept,
    ):
        """gate: an open one where none is given; kept: how much `Sessions` keep."""
        if gate is None:
            gate = Gate(hold_timeout=30)
            gate.open()
        self.gate, self.sessions = gate, Sessions(**kept)
        self.metrics = gate.metrics
        self.session = self.open()
        self.app = layered(
            app, KEY, gate, version, self.sessions, list(names), vocabulary, {}, limits
        )

    def open(self):
        """Another session."""
        session = Session("http://server/v1", (None, None), self.sessions.remove, {})
        self.sessions.add(session)
        return session

    def client(self, key=None):
        """With the session's key, or another; with none where that is empty."""
        key = self.session.api_key if key is None else key
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app),
            base_url="http://server",
            headers={"authorization": f"Bearer {key}"} if key else {},
        )

    def at(self, name):
        """A metric's value now."""
        return self.metrics.values()[f"rollout_server_{name}"]

    async def post(self, path, body=None, key=None, **headers):
        async with self.client(key) as client:
            return await client.post(path, json=body or {}, headers=headers)

    async def get(self, path, key=None):
        async with self.client(key) as client:
            return await client.get(path)


async def start(send, kind=b"text/event-stream", status=200):
    """The head of an answer."""
    headers = [(b"content-type", kind)]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def say(send, event, more=True, name=""):
    """An event of a stream."""
    text = event if isinstance(event, str) else json.dumps(event)
    body = f"{name}data: {text}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": more})


def events(answer):
    """The JSON of each event."""
    lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]
