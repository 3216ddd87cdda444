"""The documentation: every code block of every page runs, links lead somewhere, the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_page import blocks_of, check, commands_of

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "GPURHO_ROOT": str(ROOT),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "MPLBACKEND": "agg",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        # What NumPy warns of is a fault; torch announces what it will drop.
        [sys.executable, "-W", "ignore", "-W", "error::RuntimeWarning", str(ROOT / "tests" / "run_page.py"), str(page)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "trust not known" not in done.stdout + done.stderr


def test_pages_say_something_that_runs() -> None:
    ran = [b for page in PAGES for b in blocks_of(page.read_text()) if b.reason is None and b.language != "text"]
    assert len(ran) > 20


def test_blocks_and_marks() -> None:
    text = (
        "a\n```python\nx = 1\n```\n<!-- not run: no GPU -->\n```bash\ngpurho a \\\n  b # c\nls\n```\n```text\nz\n```\n"
    )
    blocks = blocks_of(text)
    assert [(b.language, b.line, b.reason) for b in blocks] == [
        ("python", 3, None),
        ("bash", 7, "no GPU"),
        ("text", 12, None),
    ]
    assert commands_of(blocks[1].code) == [["a", "b"]]
    with pytest.raises(SystemExit, match="page:7: gpurho a b"):
        check(blocks[1], "page")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.stem)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f"{page.name}\n" in navigation, f"{page.name} is not in mkdocs.yml"


def test_the_site_builds(tmp_path: Path) -> None:
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("pip install 'gpurho[docs]' brings MkDocs")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    done = subprocess.run([*command, str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in ("gpurho.predict", "gpurho.Density", "gpurho.trust"):
        assert name in reference
    command_line = (tmp_path / "site" / "cli" / "index.html").read_text()
    assert "gpurho predict" in command_line
    assert "--spacing" in command_line
    # Nothing is fetched from elsewhere: fonts and scripts are the site's own.
    for page in (tmp_path / "site").rglob("*.html"):
        for source in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text()):
            assert "canonical" in source or "gpurho" in source, f"{page.name} fetches {source}"
    shutil.rmtree(tmp_path / "site")
