"""What the documentation's site is made of besides docs/: hooks of mkdocs (`make docs`).

README.md, CONTRIBUTING.md and CHANGELOG.md become pages of it. The page of options is written from
`RolloutConfig`'s source, without importing it. What was built is looked at in the end: every link
must lead somewhere, and nothing may be loaded from elsewhere.
"""

import ast
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
OPTIONS_HERE = "<!-- options -->"
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
# Attributes that make a browser load something, by tag. `a` is followed by people only.
_LOADS = {
    "script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src",
    "object": "data", "link": "href",
}  # fmt: skip


# -- hooks ------------------------------------------------------------------------------------


def on_files(files, config):
    """Add the pages that lie outside of docs/."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        text = as_page((ROOT / name).read_text())
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, **_):
    """Write the options into their page."""
    if OPTIONS_HERE in markdown:
        source = (ROOT / "rollout_server" / "config.py").read_text()
        markdown = markdown.replace(OPTIONS_HERE, options_page(source))
    return markdown


def on_page_content(html, **_):
    """Let paths and names in tables be broken where they have joints: phones are narrow."""
    return re.sub(r"<td>.*?</td>", lambda cell: _breakable(cell[0]), html, flags=re.S)


def _breakable(cell: str) -> str:
    return re.sub(
        r"<code>([^<]+)</code>",
        lambda code: (
            "<code>" + re.sub(r"([/_]|\.(?!py\b|sh\b))(?=\w)", r"\1<wbr>", code[1]) + "</code>"
        ),
        cell,
    )


def on_post_build(config):
    """Fail on a link that leads nowhere, and on what would be loaded from elsewhere."""
    from mkdocs.exceptions import PluginError

    if found := problems(Path(config.site_dir)):
        raise PluginError("the site that was built has problems:\n" + "\n".join(found))


# -- pages from elsewhere ---------------------------------------------------------------------


def as_page(text: str) -> str:
    """A file of the root as a page: its links lead to pages, as seen from docs/."""

    def moved(link: re.Match) -> str:
        path, anchor = link[1], link[2] or ""
        page = PAGES.get(path) or path.removeprefix("docs/")
        return f"]({page}{anchor})"

    return _LINK.sub(moved, text)


# -- options ----------------------------------------------------------------------------------


@dataclass
class Section:
    """Options that belong together: (names, what they do) of each."""

    title: str
    entries: list[tuple[list[str], str]] = field(default_factory=list)


def options_page(source: str) -> str:
    """The options in Markdown, from the source of `RolloutConfig`.

    Raises `ValueError` if a field isn't documented, or what is documented isn't a field.
    """
    (config,) = [
        node for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "RolloutConfig"
    ]  # fmt: skip
    fields = {
        node.target.id: (ast.unparse(node.annotation), _default(node.value))
        for node in config.body
        if isinstance(node, ast.AnnAssign)
    }
    opening, sections = _read(ast.get_docstring(config) or "")
    told = [name for section in sections for names, _ in section.entries for name in names]
    if sorted(told) != sorted(fields):
        wrong = ", ".join(sorted(set(told) ^ set(fields))) or "one is told twice"
        raise ValueError(f"RolloutConfig: docstring and fields differ: {wrong}")
    lines = [opening]
    for section in sections:
        title, _, note = section.title.partition(" (")
        lines += [f"## {title}"] + ([f"({note}"] if note else [])
        for names, text in section.entries:
            for name in names:
                kind, default = fields[name]
                lines += [f"### `{name}` {{ #{name} }}", f"`{kind}`, default `{default}`", text]
    return "\n\n".join(lines)


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default" in given:
            return ast.unparse(given["default"])
        return ast.unparse(given["default_factory"]).replace("dict", "{}")
    return "none: it must be given" if value is None else ast.unparse(value)


def _read(docstring: str) -> tuple[str, list[Section]]:
    """The opening paragraph, and the sections: `Title:`, then indented `name: what it does`."""
    opening, *blocks = docstring.split("\n\n")
    sections: list[Section] = []
    for block in blocks:
        title, *lines = block.split("\n")
        if not title.endswith(":"):  # an option by itself
            title, lines = "Besides:", ["    " + line for line in [title, *lines]]
        section = Section(title[:-1])
        sections.append(section)
        for line in lines:
            if entry := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
                section.entries.append((entry[1].split(", "), entry[2]))
            elif not section.entries:
                raise ValueError(f"RolloutConfig: not an option: {line!r}")
            else:
                names, text = section.entries[-1]
                section.entries[-1] = names, f"{text} {line.strip()}"
    return " ".join(opening.split()), sections


# -- what was built ---------------------------------------------------------------------------


class _Page(HTMLParser):
    """The ids of a page, its links, and what a browser loads for it."""

    def __init__(self, html: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if (load := given.get(_LOADS.get(tag, ""))) and given.get("rel") != "canonical":
            self.loads.append(load)
        if "mermaid" in (given.get("class") or "").split():
            self.loads.append("https://unpkg.com, for the theme's drawing of mermaid")


def problems(site: Path) -> list[str]:
    """What is wrong with the site in a folder, a line each."""
    pages = {path: _Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        here = path.relative_to(site)
        for link in page.links + page.loads:
            if why := _leads_nowhere(site, path, link, pages):
                found.append(f"{here}: {link}: {why}")
        found += [f"{here}: loads {link}" for link in page.loads if _is_elsewhere(link)]
    for path in sorted(site.rglob("*.css")):
        for link in re.findall(
            r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^)\"'\s]+)", path.read_text()
        ):
            found.append(f"{path.relative_to(site)}: loads {link}")
    return found


def _is_elsewhere(link: str) -> bool:
    return link.startswith("//") or urlsplit(link).scheme in ("http", "https")


def _leads_nowhere(site: Path, path: Path, link: str, pages: dict[Path, _Page]) -> str | None:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    to = unquote(parts.path)
    base = site if to.startswith("/") else path.parent
    target = (base / to.lstrip("/")).resolve() if to else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return "no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].ids:
        return f"no #{anchor} there"
    return None
