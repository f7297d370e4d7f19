"""vLLM's own app, behind our layers."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from rollout_server import vllm_compat as compat
from rollout_server.http.calls import current
from rollout_server.http.direct import DirectEndpoints
from rollout_server.http.faults import Faults
from rollout_server.http.intake import Handed, Intake
from rollout_server.http.layers import Hold, Routes
from rollout_server.http.limits import Limits
from rollout_server.http.names import Names
from rollout_server.http.record import Calls
from rollout_server.http.sessions import Owner, Rewards, Sessions
from rollout_server.http.turns import Turns
from rollout_server.lifecycle.gate import Gate


async def serving_app(
    client: Any,
    names: list[str],
    sampling: Mapping[str, Any],
    tool_parser: str | None,
    reasoning_parser: str | None,
) -> Any:
    """vLLM's FastAPI app over its engine client, without any layer of ours.

    sampling: defaults of the fields that a request leaves out; all but max_tokens are known to
    the client's model config already.
    """
    build_app, init_app_state = compat.app_builders()
    args = _arguments(client, names, tool_parser, reasoning_parser)
    tasks = await client.get_supported_tasks()
    app = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    # vLLM's error handlers end this server when the engine dies; ours goes on, to say so.
    app.state.server = SimpleNamespace(should_exit=False)
    if sampling.get("max_tokens") is not None:
        _default_max_tokens(app.state, sampling["max_tokens"])
    return app


def layered(
    app: Any, key: str, gate: Gate, version: Callable[[], int], sessions: Sessions,
    names: list[str], vocabulary: int, sampling: Mapping[str, Any], limits: Limits | None = None,
    vllm: Any = None,
) -> Owner:  # fmt: skip
    """What uvicorn serves: `app` behind all layers.

    names: of the model; vocabulary: number of token ids that it has; sampling: defaults of the
    fields that a request leaves out; vllm: vLLM's FastAPI app, where it is behind `app`.
    """
    limits = limits or Limits()
    inner = Handed(app) if vllm is None else DirectEndpoints(Handed(app), vllm)
    named = Names(Turns(Faults(inner)), names)
    calls = Calls(named, gate, version, vocabulary, sampling, sessions.retries)
    return Owner(Routes(Intake(Hold(Rewards(calls), gate, limits), limits)), key, sessions)


def _arguments(
    client: Any, names: list[str], tool_parser: str | None, reasoning_parser: str | None
) -> Namespace:
    args = compat.frontend_arguments()
    args.model = client.model_config.model
    args.served_model_name = names
    args.api_key = None  # the key is checked in front of the app
    args.allowed_origins = []  # no cross-origin requests
    args.tool_call_parser = tool_parser
    args.enable_auto_tool_choice = tool_parser is not None
    args.structured_outputs_config = client.vllm_config.structured_outputs_config
    if reasoning_parser is not None:
        args.structured_outputs_config.reasoning_parser = reasoning_parser
    return args


def _default_max_tokens(state: Any, max_tokens: int) -> None:
    """A request's length where it gives none. As a field of the model config it would also cap
    what a request asks for."""
    for name in ("openai_serving_chat", "openai_serving_responses"):
        serving = getattr(state, name, None)
        if serving is not None and hasattr(serving, "default_sampling_params"):
            serving.default_sampling_params = {
                **serving.default_sampling_params,
                "max_tokens": max_tokens,
            }
    if getattr(state, "openai_serving_completion", None) is not None:
        _default_length(state.openai_serving_completion, max_tokens)


def _default_length(completion: Any, max_tokens: int) -> None:
    """That of `/v1/completions`, for which vLLM has a default of its own, and so has no way to tell
    that a request gives none."""
    render = completion.render_completion_request

    async def tapped(request, *others, **options):
        call = current.get()
        if call is None or call.own_length:
            return await render(request, *others, **options)
        # A prompt needn't leave room for all of it: what room there is then bounds the answer.
        request.max_tokens = None
        rendered = await render(request, *others, **options)
        request.max_tokens = max_tokens
        return rendered

    completion.render_completion_request = tapped
