"""What the documentation names is there: files, folders, headings, commands."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_LINK = re.compile(r"\]\(([^)\s]+)\)")
# `evals/run.py`, `evals/tasks/`; no part of a longer path such as outputs/evals/, no name in capitals to be filled in
_PATH = re.compile(
    r"(?<![\w./-])(?:align|conf|docs|evals|reward|scripts|tests)/(?:[\w.-]+/)*(?:[\w.-]+\.(?:py|yaml|md|json|css|toml)\b)?"
)
_MODULE = re.compile(r"-m ((?:align|evals|reward)(?:\.\w+)*)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def missing(page: Path) -> Iterator[str]:
    """What a page names and the repository does not have, with the line."""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        for target in _LINK.findall(line):
            if "://" not in target and not _is_there(page, target):
                yield f"{page.name}:{number} links to {target}"
        for path in _PATH.findall(line):
            if path == path.lower() and not (ROOT / path).exists():
                yield f"{page.name}:{number} names {path}"
        for module in _MODULE.findall(line):
            path = ROOT.joinpath(*module.split("."))
            if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
                yield f"{page.name}:{number} runs {module}"


def _is_there(page: Path, target: str) -> bool:
    path, _, heading = target.partition("#")
    file = page.parent / path if path else page
    return file.exists() and (not heading or heading in _headings(file))


def _headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    assert list(missing(page)) == []


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One title\n[a](page.md) [b](#one-title) `evals/run.py` outputs/evals/x.py python -m evals\n"
        "[c](absent.md) [d](#two)\n`evals/absent.py` and `evals/absent/`\npython -m evals.absent\n"
    )
    assert list(missing(page)) == [
        "page.md:3 links to absent.md",
        "page.md:3 links to #two",
        "page.md:4 names evals/absent.py",
        "page.md:4 names evals/absent/",
        "page.md:5 runs evals.absent",
    ]


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_every_page_is_reached_from_another(page: Path) -> None:
    others = [other.read_text(encoding="utf-8") for other in PAGES if other != page]
    assert any(f"{page.name})" in text or f"{page.name}#" in text for text in others)
