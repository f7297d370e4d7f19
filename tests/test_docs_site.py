"""The parts of `make docs` that are this project's own: the page of options, the moved pages, and
the look at what was built, which must find what is wrong."""

import importlib.util
from pathlib import Path

import pytest

from rollout_server import RolloutConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site():
    """scripts/docs_site.py, which mkdocs loads by its path too."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts/docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config():
    return (ROOT / "rollout_server/config.py").read_text()


def test_the_page_of_options_has_all_with_their_defaults(site, config):
    page = site.options_page(config)
    for name in RolloutConfig.__dataclass_fields__:
        assert page.count(f"{{ #{name} }}") == 1, name
    assert "`float`, default `600.0`\n\nhow long a request waits for the engine" in page
    assert "`str | None`, default `None`\n\nsecret that clients send" in page
    assert "## Deadlines\n" in page and "## Where it listens\n" in page


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("        hold_timeout: how", "        hold_timeouts: how", "hold_timeout, hold_timeouts"),
        ("    host: str =", "    hosts: str =", "host, hosts"),
        ("    port: int = 0\n", "    port: int = 0\n    another: int = 0\n", "another"),
        ("        port: TCP port", "        host: TCP port", "port"),
    ],
)
def test_an_option_that_is_not_documented_fails(site, config, old, new, told):
    assert config.count(old) == 1
    with pytest.raises(ValueError, match=f"docstring and fields differ: {told}$"):
        site.options_page(config.replace(old, new))


def test_links_of_files_of_the_root_lead_to_pages(site):
    text = "[a](docs/trl.md#x) [b](CHANGELOG.md) [c](https://example.org/docs/d.md) [e](#f)"
    assert site.as_page(text) == (
        "[a](trl.md#x) [b](changelog.md) [c](https://example.org/docs/d.md) [e](#f)"
    )


GOOD = '<h1 id="here">A</h1><a href="other.html#there">b</a><a href="#here">c</a><img src="a.svg">'


@pytest.fixture
def built(tmp_path):
    """A small site without a fault."""
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "other.html").write_text(
        '<p id="there">d</p><a href="https://example.org">e</a><a href=".">f</a>'
    )
    (tmp_path / "a.svg").write_text("<svg/>")
    (tmp_path / "a.css").write_text("a { background: url(data:image/png;base64,) }")
    return tmp_path


def test_a_site_without_a_fault(site, built):
    assert site.problems(built) == []


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ('<a href="others.html">', "others.html: no such file"),
        ('<a href="other.html#nowhere">', "other.html#nowhere: no #nowhere there"),
        ('<a href="#nowhere">', "#nowhere: no #nowhere there"),
        ('<img src="b.svg">', "b.svg: no such file"),
        ('<script src="https://example.org/a.js"></script>', "loads https://example.org/a.js"),
        ('<link rel="stylesheet" href="//example.org/a.css">', "loads //example.org/a.css"),
        ('<pre class="mermaid">graph</pre>', "loads https://unpkg.com"),
    ],
)
def test_a_fault_of_the_site_is_found(site, built, page, told):
    (built / "index.html").write_text(GOOD + page)
    (found,) = site.problems(built)
    assert found.startswith("index.html: ") and told in found


def test_a_font_from_elsewhere_is_found(site, built):
    (built / "a.css").write_text("@font-face { src: url('https://example.org/a.woff2') }")
    assert site.problems(built) == ["a.css: loads https://example.org/a.woff2"]
