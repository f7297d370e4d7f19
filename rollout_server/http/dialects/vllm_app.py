"""vLLM's own app, which speaks OpenAI's and Anthropic's dialects."""

from argparse import Namespace
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from rollout_server import vllm_compat as compat
from rollout_server.http.tokens.calls import current


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

    async def hooked(request: Any, *others: Any, **options: Any) -> Any:
        call = current.get()
        if call is None or call.own_length:
            return await render(request, *others, **options)
        # A prompt needn't leave room for all of it: what room there is then bounds the answer.
        request.max_tokens = None
        rendered = await render(request, *others, **options)
        request.max_tokens = max_tokens
        return rendered

    completion.render_completion_request = hooked
