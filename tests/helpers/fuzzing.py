"""Requests of no sense, made by hypothesis: mutations of good ones, and JSON of any shape.

What is required of the server, whatever it is sent: an answer, no 5xx but 503, and to go on.
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import inside
from good_requests import NASTY, ROUTES
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

PATIENCE = 240  # seconds

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(NASTY),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
wrong = st.sampled_from(NASTY) | anything


def places(value, before=()):
    """The paths of all that is in a JSON value."""
    if not isinstance(value, (dict, list)):
        return
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*before, name)
        yield from places(inner, (*before, name))


def short(request, base):
    """With a length: an answer as long as the context is no attack, it only takes its time."""
    for name in ("max_tokens", "max_output_tokens", "sampling_params"):
        if name in base and not request.get(name):  # 0 is none to some routes
            request[name] = base[name]
    fields = request.get("sampling_params")
    if isinstance(fields, dict) and not fields.get("max_new_tokens"):
        fields["max_new_tokens"] = 2
    return request


def holder(value, place):
    for name in place[:-1]:
        value = value[name]
    return value


@st.composite
def mutated(draw, path):
    """A good request for a route, some of its values put out, replaced, or doubled."""
    base, options = ROUTES[path]
    names = draw(st.lists(st.sampled_from(sorted(options) or ["none"]), max_size=3))
    request = json.loads(json.dumps(base | {n: options[n] for n in names if n in options}))
    for _ in range(draw(st.integers(0, 3))):
        known = sorted(places(request), key=repr)
        if not known:
            break
        place = draw(st.sampled_from(known))
        inside, name = holder(request, place), place[-1]
        what = draw(st.sampled_from(["replace", "replace", "replace", "delete", "double", "wrap"]))
        if what == "delete":
            del inside[name]
        elif what == "double" and isinstance(inside, list):
            inside.insert(name, inside[name])
        elif what == "wrap":
            inside[name] = [inside[name]]
        else:
            inside[name] = json.loads(json.dumps(draw(wrong)))
    return short(request, base)


@st.composite
def bodies(draw):
    """(path, the bytes of a body)."""
    path = draw(st.sampled_from(sorted(ROUTES)))
    kind = draw(st.sampled_from(["mutated"] * 8 + ["anything", "bytes"]))
    if kind == "mutated":
        return path, json.dumps(draw(mutated(path))).encode()
    if kind == "anything":
        return path, json.dumps(draw(anything)).encode()
    whole = json.dumps(ROUTES[path][0]).encode()
    at = draw(st.integers(0, len(whole)))
    return path, whole[:at] + draw(st.binary(max_size=4)) + whole[at + draw(st.integers(0, 3)) :]


class Fuzz:
    """Sends bodies to a server and its session; `counts` by status."""

    def __init__(self, server):
        self._server = server
        self._root = server.base_url.removesuffix("/v1")
        self._session = server.session()
        self._client = httpx.Client(timeout=PATIENCE)
        self.counts = Counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._client.close()
        self._session.end()

    def send(self, path, body, in_session):
        headers = {"content-type": "application/json"}
        if in_session:
            url = f"{self._root}/sessions/{self._session.id}{path}"
        else:
            url = self._root + path
            headers["authorization"] = f"Bearer {self._server.api_key}"
        try:
            answer = self._client.post(url, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise AssertionError(f"{path} {body!r}: {error!r}") from error
        status = answer.status_code
        self.counts[status] += 1
        assert status < 500 or status == 503, f"{path} {body!r}: {answer.text[:500]}"
        assert "Traceback" not in answer.text, f"{path} {body!r}: {answer.text[:500]}"
        if status >= 400:
            assert answer.json()["error"]["message"] is not None


def require_answering(server):
    """It answers a normal request, and nothing of others is left behind."""
    with server.openai() as client:
        answer = client.completions.create(model="policy", prompt=[5], max_tokens=2)
    assert answer.usage.completion_tokens >= 1
    assert not inside.output_processor(server).has_unfinished_requests()
    assert server.state == "awake"


def fuzz(server, cases, number, clients=4):
    """Send `cases` bodies, from several clients at a time; how many were answered, by status."""
    with ThreadPoolExecutor(clients) as pool, Fuzz(server) as fuzzing:
        runs = [pool.submit(_run, fuzzing, cases // clients, number + i) for i in range(clients)]
        for run in runs:
            run.result()
    require_answering(server)
    return fuzzing.counts


def drawn(cases, number):
    """A decorator of what hypothesis runs: so many cases, which the number decides."""
    only_generated = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        print_blob=False,
    )
    return lambda work: seed(number)(only_generated(work))


def _run(fuzzing, cases, number):
    @drawn(cases, number)
    @given(bodies(), st.booleans())
    def send(body, in_session):
        fuzzing.send(*body, in_session)

    send()
