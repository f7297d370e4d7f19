"""Plain requests go to vLLM's endpoints directly, and are answered as FastAPI has them answered.

The app is the tests' own, with what vLLM's has: a model with validators, a dependency, handlers of
errors, middleware.
"""

import functools
import json

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import Instrumentator
from pydantic import BaseModel, model_validator
from starlette.middleware.cors import CORSMiddleware
from vllm_fields import vllms_app

from rollout_server.http.body import LARGE
from rollout_server.http.middleware.body_limit import ReplayBody
from rollout_server.http.middleware.direct import DirectEndpoints
from rollout_server.http.scope import BODY, REQUEST, SIZE

CHAT = "/v1/chat/completions"


class Asked(BaseModel):
    messages: list[dict]
    fail: str | None = None
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, data):
        for message in data["messages"]:
            message["content"] = message.pop("text", "")  # vLLM's change them too
        return data


class Odd(Exception):
    pass


async def validate_json_request(raw_request: Request):
    kind = raw_request.headers.get("content-type", "").lower()
    if kind.split(";", maxsplit=1)[0] != "application/json":
        raise RequestValidationError(errors=["only JSON"])


def decorated(endpoint):
    @functools.wraps(endpoint)
    async def wrapper(*args, **options):
        raw = args[1] if len(args) > 1 else options["raw_request"]
        raw.app.state.calls.append("router" in raw.scope)
        return await endpoint(*args, **options)

    return wrapper


def vllm(registry):
    app = FastAPI()
    app.state.calls = []  # for each call of the endpoint, whether it came through FastAPI's router
    app.add_middleware(CORSMiddleware, allow_origins=[])
    Instrumentator(registry=registry).instrument(app)

    @app.post(CHAT, dependencies=[Depends(validate_json_request)])
    @decorated
    async def chat(request: Asked, raw_request: Request):
        raw_request.state.seen = True
        kinds = {"value": ValueError("a value"), "odd": Odd("odd"), "other": KeyError("other")}
        if request.fail == "http":
            raise HTTPException(418, "short and stout")
        if request.fail == "gone":
            return None
        if request.fail:
            raise kinds[request.fail]
        if request.stream:

            async def events():
                for at in range(3):
                    yield f"data: {at}\n\n"

            return StreamingResponse(content=events(), media_type="text/event-stream")
        told = request.model_dump() | {"app": raw_request.app.state is app.state}
        return JSONResponse(content=told, headers={"x-metrics": "1"})

    @app.post("/v1/completions")
    async def completions(raw_request: Request):
        raw_request.app.state.calls.append("router" in raw_request.scope)
        return JSONResponse({})

    async def handled(request: Request, error: Exception):
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=400)

    async def last(request: Request, error: Exception):
        return JSONResponse({"error": "ours"}, status_code=500)

    app.exception_handler(ValueError)(handled)
    app.exception_handler(HTTPException)(handled)
    app.exception_handler(RequestValidationError)(handled)
    app.exception_handler(Exception)(last)
    return app


async def post(app, body, path=CHAT, raised=None, **headers):
    """The answer, the body as the layers outside hand it on."""

    async def read(scope, receive, send):
        if isinstance(body, bytes):
            given, request = body, None
        else:
            given, request = json.dumps(body).encode(), body
        scope = {**scope, BODY: given, REQUEST: request, SIZE: len(given)}
        await app(scope, receive, send)

    transport = httpx.ASGITransport(app=read, raise_app_exceptions=raised is not None)
    async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
        headers = {"content-type": "application/json"} | headers
        return await client.post(path, content=b"", headers=headers)


@pytest.fixture
def ways():
    """FastAPI's way alone, and the direct one in front of it, each with its registry."""
    registries = CollectorRegistry(), CollectorRegistry()
    apps = [vllm(registry) for registry in registries]
    yield (ReplayBody(apps[0]), DirectEndpoints(ReplayBody(apps[1]), apps[1])), apps, registries


ASKED = {"messages": [{"role": "user", "text": "Hi"}]}


@pytest.mark.parametrize(
    "body, headers, direct",
    [
        (ASKED, {}, True),
        (ASKED | {"stream": True}, {}, True),
        (ASKED | {"fail": "value"}, {}, True),
        (ASKED | {"fail": "http"}, {}, True),
        (ASKED | {"fail": "odd"}, {}, True),
        (ASKED, {"content-type": "application/json; charset=utf-8"}, True),
        (ASKED, {"origin": "http://elsewhere"}, True),
        (ASKED | {"padding": "x" * LARGE}, {}, False),
        (ASKED, {"content-type": "text/plain"}, None),
        (ASKED | {"stream": "perhaps"}, {}, None),
        ({"messages": "none"}, {}, None),
        (b"", {}, None),
    ],
)
async def test_answers_are_those_of_fastapi(ways, body, headers, direct):
    """direct: None where no endpoint is called."""
    (through, directly), apps, registries = ways
    before = json.dumps(body) if isinstance(body, dict) else body
    one, other = [await post(way, body, **headers) for way in (through, directly)]
    assert other.status_code == one.status_code
    assert other.content == one.content
    assert other.headers == one.headers
    assert (json.dumps(body) if isinstance(body, dict) else body) == before
    assert apps[1].state.calls == ([] if direct is None else [not direct])
    told = [dict(counted(registry)) for registry in registries]
    assert told[0] == told[1] and told[0]


def counted(registry):
    for family in registry.collect():
        for sample in family.samples:
            timed = "duration" in sample.name and not sample.name.endswith("_count")
            if not timed and not sample.name.endswith("_created"):
                yield (sample.name, *sorted(sample.labels.items())), sample.value


async def test_what_no_handler_is_for_is_raised_once_it_is_answered(ways):
    (through, directly), apps, _ = ways
    for way in (through, directly):
        answer = await post(way, ASKED | {"fail": "other"})
        assert (answer.status_code, answer.json()) == (500, {"error": "ours"})
        with pytest.raises(KeyError):
            await post(way, ASKED | {"fail": "other"}, raised=True)
    assert apps[1].state.calls == [False, False]


async def test_other_endpoints_are_left_to_fastapi(ways):
    (_, directly), apps, _ = ways
    assert (await post(directly, {}, "/v1/completions")).status_code == 200
    assert apps[1].state.calls == [True]


async def test_an_app_with_middleware_that_is_not_known_is_left_alone():
    app = vllm(CollectorRegistry())

    @app.middleware("http")
    async def other(request, call_next):
        answer = await call_next(request)
        answer.headers["x-other"] = "1"
        return answer

    answer = await post(DirectEndpoints(ReplayBody(app), app), ASKED)
    assert answer.headers["x-other"] == "1"
    assert app.state.calls == [True]


def test_vllms_own_endpoints_are_called_directly():
    """An upgrade of vLLM that changes how they are built would send all requests the long way."""
    app = vllms_app()
    paths = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
    assert DirectEndpoints(app, app).paths == paths
