"""What the documentation's pages hold (blocks, code, tables), and whether what they name exists.

Each `require_...` fails with what is wrong.
"""

import ast
import configparser
import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import shlex
from pathlib import Path

from rollout_server import Completion, RolloutConfig, RolloutServer, SyncReport, attach
from rollout_server.http import routes
from rollout_server.trajectories.session import Session

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
OPTIONS = {field.name: field for field in dataclasses.fields(RolloutConfig)}
# What a name stands for in the pages' code.
OBJECTS = {
    "server": RolloutServer,
    "session": Session,
    "completion": Completion,
    "report": SyncReport,
    "SyncReport": SyncReport,
    "RolloutServer": RolloutServer,
}
LOGGERS = ("rollout_server.requests", "rollout_server.lifecycle")
# Which test runs a command, by its beginning: the test's file, and what in it does.
RUN_BY = {
    "python -m rollout_server.doctor memory": (
        "doctor/test_memory.py",
        '"-m", "rollout_server.doctor", "memory"',
    ),
    "python -m rollout_server.doctor": ("doctor/test_doctor.py", '"-m", "rollout_server.doctor"'),
    "python -m rollout_server.bench refit": (
        "benchmarks/test_refit.py",
        '"-m", "rollout_server.bench", "refit"',
    ),
    "python -m rollout_server.bench gpu": (
        "bench/test_gpu.py",
        '"-m", "rollout_server.bench", "gpu"',
    ),
    "python scripts/vllm_names.py": ("test_vllm_names.py", "looking.missing(installed)"),
    "python recipes/agent.py": ("recipes/test_agent_recipe.py", "str(RECIPE)"),
    "python recipes/nemo_gym/run.py": (
        "integrations/test_nemo_gym.py",
        '"recipes/nemo_gym/run.py"',
    ),
    "accelerate launch": ("test_docs.py", "def test_the_launch_command"),
    "curl": ("test_docs.py", "def test_the_metrics_command"),
}
# No test runs these, but looks up what they name: what installs, and targets (`make test` runs it).
NOT_RUN = ("make", "pip install", "recipes/nemo_gym/setup.sh", "scripts/gpu.sh")
FILES = (".py", ".sh", ".md", ".yaml", ".cfg", ".txt", ".in", ".ipynb")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text, and what it is run with."""

    page: Path
    line: int
    language: str
    text: str
    run: str | None

    def __str__(self):
        return f"{self.page.name}:{self.line}"


def blocks_of(text, page=Path("page.md")):
    """The fenced blocks of a page."""
    found, lines = [], text.split("\n")
    at = 0
    while at < len(lines):
        if opening := re.match(r"```(\w*)$", lines[at]):
            end = lines.index("```", at + 1)
            mark = re.match(r"<!-- run: (\w+) -->$", lines[at - 1]) if at else None
            body = "\n".join(lines[at + 1 : end]) + "\n"
            found.append(Block(page, at + 1, opening[1], body, mark and mark[1]))
            at = end
        at += 1
    return found


def prose_of(text):
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def codes_of(text):
    """The inline code of a page."""
    return [code.strip() for code in re.findall(r"`([^`\n]+)`", prose_of(text))]


def rows_of(text):
    """The rows of a page's tables, as lists of cells."""
    lines = [line for line in prose_of(text).split("\n") if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not all(re.fullmatch(r"-*", cell) for cell in row)]


def commands_of(text):
    """The commands of a shell block, as lists of words, without comments; pipes end one."""
    lines = text.replace("\\\n", " ").split("\n")
    found = [shlex.split(line.split(" | ")[0], comments=True) for line in lines]
    return [words for words in found if words]


def definitions(source):
    """Names that a module defines, methods as `Class.method`; as an assignment says, or a def."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {
                name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)
            }
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else ()
            found |= {f"{node.name}.{n.name}" for n in inner if hasattr(n, "name")}
    return found


# -- whether it exists ------------------------------------------------------------------------


def attributes(cls):
    """Names that an object of a class has, those that its methods set included."""
    fields = set(getattr(cls, "__dataclass_fields__", ()))
    return set(dir(cls)) | fields | set(re.findall(r"\bself\.(\w+)\b", inspect.getsource(cls)))


def resolves(name):
    module, rest = name, []
    while module:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
            continue
        for attribute in rest:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def require_python(text):
    """Fails unless the names of this package that some code uses exist, options included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "rollout_server":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in OBJECTS:
                cls = OBJECTS[node.value.id]
                assert node.attr in attributes(cls), f"{cls.__name__} has no {node.attr}"
        elif isinstance(node, ast.Call):
            require_call(node)


def require_call(call):
    keywords = {keyword.arg for keyword in call.keywords} - {None}
    if isinstance(call.func, ast.Name) and call.func.id in ("attach", "RolloutConfig"):
        own = inspect.signature(attach).parameters if call.func.id == "attach" else ()
        assert keywords <= {*OPTIONS, *own}, f"no such option: {keywords - {*OPTIONS, *own}}"
    elif (
        isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in OBJECTS
    ):
        method = getattr(OBJECTS[call.func.value.id], call.func.attr)
        given = [None] * len(call.args)
        inspect.signature(method).bind_partial(None, *given, **dict.fromkeys(keywords))


def require_command(words):
    """Fails unless a command can be run: what it names exists, and a test runs it.

    (`NOT_RUN` aside.)
    """
    line = " ".join(words)
    if words[:3] == ["python", "-m", "pytest"]:  # as this one
        assert all((ROOT / word).is_file() for word in words[3:]), f"{line!r}: no such test"
        return
    if not f"{line} ".startswith(tuple(f"{beginning} " for beginning in NOT_RUN)):
        require_runner(line)
    source = ""
    if words[:2] == ["python", "-m"]:
        spec = importlib.util.find_spec(words[2])
        assert spec is not None, f"there is no module {words[2]}"
        if words[2].startswith("rollout_server."):
            folder = Path(spec.submodule_search_locations[0])
            source = "".join(path.read_text() for path in folder.rglob("*.py"))
    elif words[0] == "make":
        require_target(words[1])
    elif words[:2] == ["pip", "install"]:
        require_extras(words[2])
    for word in words:
        if "/" in word and not word.startswith(("$", "runs/")):
            assert (ROOT / word).is_file(), f"{line!r}: there is no {word}"
            if word.endswith(".sh"):
                assert os.access(ROOT / word, os.X_OK), f"{word} can't be executed"
            source += (ROOT / word).read_text()
    if words[0] == "python":
        for word in words[1:]:
            assert word == "-m" or not word.startswith("-") or f'"{word}"' in source, (
                f"{line!r}: there is no option {word}"
            )
        if words[1:3] == ["-m", "rollout_server.bench"]:
            assert f'"{words[3]}"' in source, f"there is no benchmark {words[3]}"


def require_runner(line):
    runners = [RUN_BY[beginning] for beginning in RUN_BY if f"{line} ".startswith(f"{beginning} ")]
    assert runners, f"no test is known to run {line!r}; see RUN_BY"
    file, does = runners[0]
    assert does in (ROOT / "tests" / file).read_text(), f"tests/{file} doesn't run {line!r}"


def require_target(name):
    listed = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.M)
    assert name in listed, f"there is no `make {name}`; there are {', '.join(listed)}"


def require_extras(requirement):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, extras = re.fullmatch(r"(\w+)\[([\w,]+)\]", requirement).groups()
    assert name == setup["metadata"]["name"]
    missing = set(extras.split(",")) - set(setup["options.extras_require"])
    assert not missing, f"there are no extras {missing}"


def require_code(code):
    """Fails if inline code is a name, a path or a route of this project's that doesn't exist."""
    if name := re.fullmatch(r"rollout_server(\.\w+)+", code):
        assert code in LOGGERS or resolves(code), f"there is no {code}"
    elif name := re.match(r"(server|session|SyncReport)\.(\w+)", code):
        assert name[2] in attributes(OBJECTS[name[1]]), f"there is no {code}"
        if "(" in code:
            require_python(code)
    elif re.fullmatch(r"rollout/\w+", code):
        written = "".join(p.read_text() for p in (ROOT / "integrations").glob("*.py"))
        logged = code.removeprefix("rollout/")
        assert re.search(rf"(?<!\w){logged}\b", written), f"nothing logs {code}"
    elif code.startswith("/"):
        assert routes.methods(code), f"there is no route {code}"
    elif re.fullmatch(r"\.?[\w-]+(/[\w.-]+)*/?", code) and ("/" in code or code.endswith(FILES)):
        made = code.startswith(("runs/", "site/"))
        assert made or (ROOT / code).exists(), f"there is no {code}"
    elif re.fullmatch(r"\w+_(timeout|bytes|requests|restarts|connections)", code):
        assert code in OPTIONS, f"attach() has no option {code}"
    elif option := re.fullmatch(r"(\w+)=(True|False|\"\w+\"|\d+)", code):
        known = {*OPTIONS, "use_vllm", "vllm_importance_sampling_mode"}
        assert option[1] in known, f"there is no option {option[1]}"
        if option[1] in OPTIONS:
            RolloutConfig(**{option[1]: ast.literal_eval(option[2])})


def require_defined(row):
    """Fails if a row names a file and, in a cell of its own, names that the file hasn't; how many
    names were looked up."""
    codes = [re.findall(r"`([^`]+)`", cell) for cell in row]
    pairs = zip(codes, row, strict=True)
    alone = [c for c, cell in pairs if c and cell == ", ".join(f"`{code}`" for code in c)]
    files = [c[0] for c in alone if len(c) == 1 and re.fullmatch(r"\w+(/\w+)+\.py", c[0])]
    names = [x for cell in alone for x in cell if re.fullmatch(r"\w+(\.\w+)?", x)]
    if len(files) != 1:
        return 0
    defined = definitions((ROOT / files[0]).read_text())
    missing = [name for name in names if name not in defined]
    assert not missing, f"{files[0]} defines no {', '.join(missing)}"
    return len(names)
