"""What README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ say is so: names, options, commands,
paths, links and defaults exist, and the blocks that can be run are.

A block is run if the line above it is `<!-- run: server -->` (with the server of a tiny model) or
`<!-- run: loop -->` (it attaches a server of its own). `make docs` checks the rest: that the site
can be built, and that its links and anchors lead somewhere.
"""

import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pages import (
    OPTIONS,
    PAGES,
    ROOT,
    blocks_of,
    codes_of,
    commands_of,
    prose_of,
    require_code,
    require_command,
    require_defined,
    require_python,
    rows_of,
)

from rollout_server import RolloutServerError
from rollout_server.observability import logs

BLOCKS = [block for page in PAGES for block in blocks_of(page.read_text(), page)]
CODES = [(page, code) for page in PAGES for code in codes_of(page.read_text())]


# -- Python -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_the_names_in_python_blocks_exist(block):
    require_python(block.text)


@pytest.mark.parametrize(
    "wrong",
    [
        "server.sleeps()",
        "server.close(now=True)",
        "from rollout_server import atach",
        "from rollout_server.logs import JsonFormatter",
        "attach(model, tokenizer, collocate='share')",
        "session.set_reward(1.0, parts={})",
        "server.generate('a', {}, 1, 2)",
    ],
)
def test_a_wrong_name_is_found(wrong):
    with pytest.raises((AssertionError, TypeError, AttributeError, ImportError)):
        require_python(wrong)


def test_all_blocks_say_their_language():
    assert {block.language for block in BLOCKS} == {"python", "sh"}
    assert {block.run for block in BLOCKS} == {"server", "loop", None}


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.run == "server"], ids=str)
def test_blocks_run_with_a_server(block, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("rollout_server")
    level, handlers = logger.level, list(logger.handlers)
    try:
        exec(compile(block.text, str(block), "exec"), {"server": server})
    finally:
        logger.setLevel(level)
        logger.handlers = handlers


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.run == "loop"], ids=str)
def test_the_loop_of_ones_own_runs(block, tiny, tokenizer):
    """Its engine, its sleep and its wake; `update` changes the policy between two batches."""
    told = []

    def update(model, completions):
        model.get_input_embeddings().weight.data.mul_(1.01)
        told.append([(c.policy_version, len(c.ids) == len(c.logprobs) > 0) for c in completions])

    data = [SimpleNamespace(prompts=["2 + 3 =", "1 + 1 ="])] * 2
    given = {"model": tiny, "tokenizer": tokenizer, "data": data, "update": update}
    exec(compile(block.text, str(block), "exec"), given)
    assert told == [[(0, True)] * 16, [(1, True)] * 16]
    assert given["server"].state == "closed"


# -- commands ---------------------------------------------------------------------------------


COMMANDS = [
    (f"{block}", words)
    for block in BLOCKS
    if block.language == "sh"
    for words in commands_of(block.text)
] + [
    (page.name, shlex.split(code))
    for page, code in CODES
    if re.match(r"(make [a-z]|python (-m |\w+/))", code)
]


@pytest.mark.parametrize(
    ("where", "words"), COMMANDS, ids=[f"{w}-{' '.join(c)[:40]}" for w, c in COMMANDS]
)
def test_commands_exist_and_are_run_by_a_test(where, words):
    require_command(words)


@pytest.mark.parametrize(
    "wrong",
    [
        "make demos",
        "python -m rollout_server.doktor",
        "python -m rollout_server.doctor --yaml",
        "python -m rollout_server.bench refits",
        "python recipes/agents.py",
        "python recipes/agent.py --stepps 5",
        "pip install rollout_server[gpu]",
        "accelerate launch --config_file recipes/accelerate/none.yaml recipes/train.py",
        "rm -rf runs",
    ],
)
def test_a_wrong_command_is_found(wrong):
    with pytest.raises(AssertionError):
        require_command(shlex.split(wrong))


def shell_line(beginning):
    lines = [line for b in BLOCKS if b.language == "sh" for line in b.text.split("\n")]
    (line,) = [line for line in lines if line.startswith(beginning)]
    return line


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_launch_command(tmp_path):
    """A step of training as the page starts it, which is as `make demo` does."""
    line = shell_line("accelerate launch")
    demo = " ".join((ROOT / "Makefile").read_text().replace("\\\n", " ").split())
    assert line in demo
    small = "--max_steps 1 --per_device_train_batch_size 2 --num_generations 2"
    given = [*shlex.split(f"{line} {small}"), "--output_dir", str(tmp_path)]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = subprocess.run(
        given, cwd=ROOT, capture_output=True, text=True, timeout=280, env=environment
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert '"steps": 1' in (tmp_path / "summary.json").read_text()


@pytest.mark.slow
def test_the_metrics_command(server):
    line = shell_line("curl")
    given = {"KEY": server.api_key, "ROOT": server.base_url.removesuffix("/v1")}
    run = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=os.environ | given, timeout=60
    )
    lines = run.stdout.splitlines()
    assert len(lines) > 10 and all(line.startswith("rollout_server_") for line in lines)


# -- prose ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_inline_code_names_exists(page):
    # What moved is told by its old name, too.
    old = {"rollout_server.agents", "rollout_server.logs"} if page.name == "CHANGELOG.md" else set()
    for code in codes_of(page.read_text()):
        if code not in old:
            require_code(code)


@pytest.mark.parametrize(
    "wrong",
    [
        "rollout_server.logs",
        "rollout_server.lifecycle.lifecycles",
        "server.foo()",
        "session.nummer",
        "SyncReport.way",
        "rollout/temperature_of_it",
        "/v1/chat",
        "rollout_server/http/tables.py",
        "tests/test_attack.py",
        "recipe/",
        "max_waiting_requests",
        'colocate="shared"',
        "offload=True",
        "session.set_reward(1.0, parts={})",
    ],
)
def test_wrong_inline_code_is_found(wrong):
    with pytest.raises((AssertionError, TypeError, RolloutServerError)):
        require_code(wrong)


# -- tables -----------------------------------------------------------------------------------


def test_functions_that_tables_name_are_in_the_files_they_name():
    looked_up = sum(require_defined(row) for page in PAGES for row in rows_of(page.read_text()))
    assert looked_up > 20
    with pytest.raises(AssertionError, match=r"routes\.py defines no knows"):
        require_defined(["1", "`rollout_server/http/routes.py`", "`knows`", "which routes"])


def test_each_walk_has_at_most_ten_hops():
    text = (ROOT / "docs/architecture.md").read_text()
    walks = re.findall(r"^## (A [^\n]*, walked)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    assert [title for title, _ in walks] == ["A weight tensor, walked", "A chat request, walked"]
    for title, walk in walks:
        hops = [row for row in rows_of(walk) if row[0].isdigit()]
        assert [int(row[0]) for row in hops] == list(range(1, len(hops) + 1))
        assert 5 <= len(hops) <= 10, title
        assert all(require_defined(row) for row in hops), title


def amount(text):
    """What "16 MiB" or "60 s" is, in the unit of options."""
    number, unit = re.match(r"(\d+)(?: (MiB|s)\b)?", text).groups()
    return int(number) * (1 << 20 if unit == "MiB" else 1)


def test_defaults_in_tables_are_those_of_the_options():
    checked = set()
    for row in rows_of((ROOT / "docs/reliability.md").read_text()):
        name = re.match(r"`(\w+)`", row[0])
        if name and name[1] in OPTIONS and row[1][0].isdigit():
            assert amount(row[1]) == OPTIONS[name[1]].default, row
            checked.add(name[1])
    assert len(checked) == 6


def test_the_table_of_loggers_has_all():
    rows = rows_of((ROOT / "docs/observability.md").read_text())
    told = rows[next(i for i, row in enumerate(rows) if row[0] == "logger") + 1 :][:3]
    ours = {logger.name for logger in (logs.GENERAL, logs.REQUESTS, logs.LIFECYCLE)}
    assert {row[0].strip("`") for row in told} == ours


# -- README and links -------------------------------------------------------------------------


def test_the_readme_is_a_page_or_two():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) < 6000 and readme.count("\n") < 150


def broken_links(page, text):
    """Links to files that aren't there; those on the web are nobody's to follow here."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", prose_of(text))
    return [
        link
        for link in links
        if not link.startswith(("https://", "http://")) and not (page.parent / link).is_file()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    assert broken_links(page, page.read_text()) == []
    assert broken_links(page, "[a](no.md#b) [c](#d)") == ["no.md"]


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT)})" in readme, page.name
