"""What we use of vLLM, looked up in a folder of its sources: names, and calls that must bind.

Nothing of vLLM's is imported, so a GPU build can be looked at anywhere:

    pip download --no-deps vllm==0.33.0 && unzip -q vllm-0.33.0-*.whl '*.py' -d sources
    python scripts/vllm_names.py sources

Imported names are taken from our own sources; calls, overridden methods and fields of what vLLM
hands us are in the lists below. What is found says nothing of what it does.
"""

import argparse
import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_ENGINE, _OPENAI = "vllm.v1.engine.", "vllm.entrypoints.openai."
_CLIENT, _CORE = _ENGINE + "async_llm:AsyncLLM.", _ENGINE + "core_client:"
_PROCESSOR, _LOADER = _ENGINE + "output_processor:", "vllm.model_executor.model_loader"
_RELOAD = _LOADER + ".reload.layerwise:"
_ARGUMENTS = "vllm.engine.arg_utils:EngineArgs"

# Each line: one of these must bind such a call. "self" stands for the object of a method.
CALLS: list[tuple[tuple[str, ...], str]] = [
    ((_CLIENT + "from_vllm_config",), "c, usage_context=0, stat_loggers=0, disable_log_stats=0"),
    ((_CLIENT + "generate",), "self, p, s, r, lora_request=0"),
    ((_CLIENT + "sleep",), "self, level=2, mode='keep'"),
    ((_CLIENT + "wake_up",), "self, tags=0"),
    ((_CLIENT + "resume_generation",), "self"),
    ((_CLIENT + "collective_rpc",), "self, m, args=0"),
    ((_CLIENT + "shutdown",), "self, timeout=0"),
    ((_CLIENT + "get_supported_tasks",), "self"),
    ((_CLIENT + "_run_output_handler",), "self"),
    (
        (_CORE + "EngineCoreClient.make_async_mp_client",),
        "vllm_config=0, executor_class=0, log_stats=0",
    ),
    ((_CORE + "AsyncMPClient.add_request_async",), "self, r"),
    (
        (
            _CORE + "AsyncMPClient.pause_generation_async",
            _CORE + "AsyncMPClient.pause_scheduler_async",
        ),
        "self, mode='keep', clear_cache=True",
    ),
    ((_CORE + "MPClient.shutdown",), "self, timeout=0"),
    (
        (_PROCESSOR + "RequestState.from_new_request",),
        "tokenizer=0, request=0, prompt=0, parent_req=0, request_index=0, queue=0, log_stats=0, "
        "stream_interval=0",
    ),
    ((_PROCESSOR + "OutputProcessor.propagate_error",), "self, e"),
    ((_PROCESSOR + "OutputProcessor.has_unfinished_requests",), "self"),
    ((_PROCESSOR + "OutputProcessor.get_num_unfinished_requests",), "self"),
    (("vllm.v1.executor.abstract:Executor.get_class",), "c"),
    ((_LOADER + ".base_loader:BaseModelLoader.__init__",), "self, c"),
    ((_LOADER + ":register_model_loader",), "name"),
    (("vllm.config.vllm:set_current_vllm_config",), "c"),
    ((_RELOAD + "initialize_layerwise_reload",), "model"),
    ((_RELOAD + "finalize_layerwise_reload",), "model, c"),
    (("vllm.lora.utils:parse_fine_tuned_lora_name",), "name, mapper"),
    (("vllm.lora.lora_weights:LoRALayerWeights.__init__",), "self, m, r, a, x, y, scaling=1"),
    (("vllm.lora.lora_model:LoRAModel.__init__",), "self, i, r, loras"),
    (("vllm.lora.model_manager:LoRAModelManager.add_adapter",), "self, a"),
    (("vllm.lora.model_manager:LoRAModelManager.activate_adapter",), "self, i"),
    (("vllm.lora.model_manager:LoRAModelManager.remove_adapter",), "self, i"),
    (
        ("vllm.entrypoints.launchers.app:build_app", _OPENAI + "api_server:build_app"),
        "args, tasks, model_config",
    ),
    (
        (
            "vllm.entrypoints.launchers.api_server.app_state:init_app_state",
            _OPENAI + "api_server:init_app_state",
        ),
        "client, state, args, tasks",
    ),
    (("vllm.renderers.base:BaseRenderer.render_messages_async",), "self, messages, params"),
    (("vllm.renderers.base:BaseRenderer.clear_mm_cache_async",), "self"),
    (
        (_OPENAI + "chat_completion.serving:OpenAIServingChat.create_chat_completion",),
        "self, request, raw",
    ),
    (
        (_OPENAI + "completion.serving:OpenAIServingCompletion.render_completion_request",),
        "self, request",
    ),
    (("vllm.inputs.engine:tokens_input", "vllm.inputs:tokens_input"), "ids"),
    (("vllm.v1.worker.gpu_worker:Worker.sleep",), "self, level=2"),
    (("vllm.v1.worker.gpu_worker:Worker.wake_up",), "self, tags=0"),
]

# Methods of vLLM's that ours take the place of: ours must take what vLLM gives.
OVERRIDES = [
    (_ENGINE + "logprobs:LogprobsProcessor._update_sample_logprobs", "engine/logprobs.py"),
    ("vllm.v1.metrics.loggers:StatLoggerBase.record", "engine/stats.py"),
    (_LOADER + ".base_loader:BaseModelLoader.load_weights", "worker/loader.py"),
    ("vllm.v1.worker.cpu_worker:CPUWorker.sleep", "worker/cpu_worker.py"),
    ("vllm.v1.worker.cpu_worker:CPUWorker.wake_up", "worker/cpu_worker.py"),
    ("vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_linear", "worker/lora.py"),
]

# Attributes that are written somewhere in the module: on `self`, or as a field of a class.
ATTRIBUTES = [
    ("vllm.v1.engine.async_llm", "engine_core output_handler output_processor renderer log_stats"),
    ("vllm.v1.engine.core_client", "resources engine_dead"),
    (
        "vllm.v1.engine.output_processor",
        "request_states detokenizer queue output_kind parent_req request_index stream_interval",
    ),
    ("vllm.v1.engine.logprobs", "logprobs cumulative_logprob"),
    ("vllm.lora.model_manager", "_last_mapping"),
]


class Sources:
    """Definitions in a folder of sources, without importing any."""

    def __init__(self, folder: Path):
        self._folder = folder

    @functools.cache  # noqa: B019 - one object, for one run
    def module(self, name: str) -> ast.Module | None:
        path = self._folder.joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return ast.parse(file.read_text(encoding="utf-8"))
        return None

    def has(self, module: str, name: str) -> bool:
        """Whether `from module import name` finds something, as far as sources tell."""
        if self.module(f"{module}.{name}") is not None:
            return True
        tree = self.module(module)
        return tree is not None and name in _names(tree)

    def function(self, place: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """Of "module:function" or "module:Class.method", inherited ones too."""
        module, _, path = place.partition(":")
        tree, parts = self.module(module), path.split(".")
        found = None if tree is None else _defined(tree.body, parts[0])
        if found is None and tree is not None and (origin := _origin(tree, module, parts[0])):
            return self.function(f"{origin}:{path}")
        if len(parts) == 1 or not isinstance(found, ast.ClassDef):
            return found if isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef)) else None
        method = _defined(found.body, parts[1])
        if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return method
        bases = (ast.unparse(base).partition("[")[0] for base in found.bases)
        inherited = (self.function(f"{module}:{base}.{parts[1]}") for base in bases)
        return next((m for m in inherited if m is not None), None)

    def fields(self, place: str) -> set[str]:
        """Annotated fields of a class, without those of its bases."""
        module, _, name = place.partition(":")
        tree = self.module(module)
        found = None if tree is None else _defined(tree.body, name)
        body = found.body if isinstance(found, ast.ClassDef) else []
        return {ast.unparse(n.target) for n in body if isinstance(n, ast.AnnAssign)}


def _defined(body: list[ast.stmt], name: str) -> ast.stmt | None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = (n for b in body for n in ast.walk(b) if isinstance(n, kinds) and n.name == name)
    return next((n for n in found if not _is_overload(n)), None)


def _is_overload(node: ast.AST) -> bool:
    return any(ast.unparse(d) == "overload" for d in getattr(node, "decorator_list", ()))


def _origin(tree: ast.Module, module: str, name: str) -> str | None:
    """The module that `name` is imported from."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if any((a.asname or a.name) == name for a in node.names):
            if not node.level:
                return node.module
            package = module.split(".")  # of an __init__: one level is itself
            return ".".join([*package[: len(package) - node.level + 1], node.module or ""])
    return None


def _names(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Import() | ast.ImportFrom():
                found |= {a.asname or a.name.split(".")[0] for a in node.names}
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Dict():  # a package that imports its names when they are asked for
                found |= {k.value for k in node.keys if isinstance(k, ast.Constant)}
    return found


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> inspect.Signature:
    told, kind = function.args, inspect.Parameter
    required = len(told.posonlyargs + told.args) - len(told.defaults)
    is_class = any(ast.unparse(d) == "classmethod" for d in function.decorator_list)
    parameters = [
        kind(a.arg, kind.POSITIONAL_OR_KEYWORD, default=kind.empty if at < required else 0)
        for at, a in enumerate(told.posonlyargs + told.args)
    ][1 if is_class else 0 :]
    if told.vararg:
        parameters.append(kind(told.vararg.arg, kind.VAR_POSITIONAL))
    for a, value in zip(told.kwonlyargs, told.kw_defaults, strict=True):
        default = kind.empty if value is None else 0
        parameters.append(kind(a.arg, kind.KEYWORD_ONLY, default=default))
    if told.kwarg:
        parameters.append(kind(told.kwarg.arg, kind.VAR_KEYWORD))
    return inspect.Signature(parameters)


def imported(ours: Path) -> Iterator[tuple[str, str, str]]:
    """(our file, vLLM's module, name) of each import of vLLM's that nothing goes on without."""
    for path in sorted(ours.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        optional = {
            n
            for t in ast.walk(tree)
            if isinstance(t, ast.Try) and any("ImportError" in ast.unparse(h) for h in t.handlers)
            for b in t.body
            for n in ast.walk(b)
        }
        for node in ast.walk(tree):
            if node in optional:
                continue
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    yield path.name, node.module or "", alias.name
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    package, _, name = alias.name.rpartition(".")
                    if package.split(".")[0] == "vllm":
                        yield path.name, package, name


def _argument_names(ours: Path) -> set[str]:
    """The fields for AsyncEngineArgs, as the functions that choose them name them."""
    names = set()
    for file in ("engine/arguments.py", "engine/lora.py"):
        for function in ast.walk(ast.parse((ours / file).read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and function.name in (
                "engine_arguments",
                "_gpu_memory",
                "adapter_arguments",
            ):
                nested = {
                    inner
                    for d in ast.walk(function)
                    if isinstance(d, ast.Dict)
                    for value in d.values
                    for inner in ast.walk(value)
                }
                for node in ast.walk(function):
                    if isinstance(node, ast.Dict) and node not in nested:
                        names |= {k.value for k in node.keys if isinstance(k, ast.Constant)}
    return names


def missing(folder: Path, ours: Path = ROOT / "rollout_server") -> list[str]:
    """A line for each name, call or field that the sources in `folder` don't have."""
    sources, lines = Sources(folder), []
    for file, module, name in imported(ours):
        if not sources.has(module, name):
            lines.append(f"{file}: {module} has no {name}")
    for places, text in CALLS:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        told = [0] * len(call.args), {str(k.arg): 0 for k in call.keywords}
        found = [f for place in places if (f := sources.function(place)) is not None]
        if not found:
            lines.append(f"there is no {' or '.join(places)}")
        elif not any(_binds(_signature(f), *told) for f in found):
            lines.append(f"{places[0]}{_signature(found[0])} doesn't take ({text})")
    for place, file in OVERRIDES:
        theirs = sources.function(place)
        tree = ast.parse((ours / file).read_text(encoding="utf-8"))
        own = _defined(tree.body, place.rpartition(".")[2])
        assert isinstance(own, ast.FunctionDef)
        if theirs is None:
            lines.append(f"there is no {place}")
        elif refused := _refused(_signature(own), _signature(theirs)):
            lines.append(f"{file}: ours in place of {place} doesn't take {refused}")
    for module, names in ATTRIBUTES:
        tree_ = sources.module(module)
        written = set() if tree_ is None else _attributes(tree_)
        lines += [f"{module} sets no attribute {n}" for n in names.split() if n not in written]
    fields = sources.fields(_ARGUMENTS)
    lines += [f"{_ARGUMENTS} has no field {n}" for n in sorted(_argument_names(ours) - fields)]
    return lines


def _binds(signature: inspect.Signature, args: list[int], options: dict[str, int]) -> bool:
    try:
        signature.bind(*args, **options)
    except TypeError:
        return False
    return True


def _refused(ours: inspect.Signature, theirs: inspect.Signature) -> list[str]:
    """Parameters of theirs that ours has no place for."""
    kinds = {p.kind for p in ours.parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return []
    return [name for name in theirs.parameters if name not in ours.parameters]


def _attributes(tree: ast.Module) -> set[str]:
    written = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            written.add(node.attr)
        elif isinstance(node, ast.AnnAssign):
            written.add(ast.unparse(node.target).rpartition(".")[2])
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            written.add(node.name)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="that holds vllm/")
    folder = parser.parse_args().folder
    if not (folder / "vllm/__init__.py").exists():
        parser.error(f"{folder} holds no vllm/__init__.py")
    lines = missing(folder)
    print("\n".join(lines) or "all names are there, and all calls bind")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
