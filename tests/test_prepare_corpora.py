"""examples/prepare_corpora.py, on made-up pages and packages: nothing is fetched."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from wkv.data import load_documents
from wkv.errors import DataError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PAGE = """<html><head><title>not text</title><link rel="next" href="{next}" /><link rel="up" href="{up}" /></head><body>
<p id="title"><a href="x"><img alt="logo" src="y" /></a>site</p><ul class="docnav top"><li>Prev</li></ul>
<div class="chapter"><h1><a id="here"> </a>{title}</h1><div class="toc"><dl><dt>1.1 contents</dt></dl></div>
<p>Two  blanks,<br />a <code>tag</code> &amp; an
entity&#8230;</p><pre class="screen"># <b>ls</b>
  a  b</pre><script>var hidden = "<p>";</script>tail</div></body></html>"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import prepare_corpora

    return prepare_corpora


@pytest.fixture
def package(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package "notes" whose file holds b"archive" and which unpacks to two texts and an empty one."""
    deb = tmp_path / "notes.deb"
    deb.write_bytes(b"archive")

    def unpack(*words: str | Path, folder: Path | None = None) -> str:
        below = Path(words[-1]) / "usr/share/doc/notes"
        (below / "deep").mkdir(parents=True)
        (below / "copyright").write_text("free")
        (below / "a.rst.gz").write_bytes(gzip.compress("première".encode()))
        (below / "deep/b.rst.gz").write_bytes(gzip.compress(b"second"))
        (below / "c.rst.gz").write_bytes(gzip.compress(b"\n"))
        return ""

    def texts(root: Path) -> object:
        return script.raw_texts(root / "usr/share/doc/notes", [".rst.gz"])

    known = {"1.0": hashlib.sha256(b"archive").hexdigest()}
    monkeypatch.setitem(script.PACKAGES, "notes", script.Package(known, "MIT", texts))
    monkeypatch.setattr(script, "fetch", lambda name, folder, any_version: (deb, "1.0"))
    monkeypatch.setattr(script, "command", unpack)
    return "notes"


def test_text_of_a_page(script: ModuleType) -> None:
    reader = script.read_html(PAGE.format(title="Chapter 1", next="b.html", up="index.html"))
    assert reader.paragraphs == ["Chapter 1", "Two blanks, a tag & an entity…", "# ls\n  a  b", "tail"]
    assert reader.links == {"next": "b.html", "up": "index.html"}


def test_pages_become_chapters_and_translations_lose_what_is_english(script: ModuleType, tmp_path: Path) -> None:
    html = tmp_path / "usr/share/doc/debian-handbook/html"
    pages = [("index", "z", ""), ("z", "a", "index.html"), ("a", "y", "z.html"), ("y", "", "index.html")]
    for language, word in (("en-US", "part"), ("fr-FR", "une partie avec beaucoup de mots"), ("xx-XX", "part")):
        (html / language).mkdir(parents=True)
        for name, after, up in pages:
            text = PAGE.format(title=f"{word} {name}", next=f"{after}.html", up=up)
            (html / language / f"{name}.html").write_text(text, encoding="utf-8")
    found = dict(script.handbook_texts(tmp_path))
    assert list(found) == ["en-US/z.txt", "en-US/y.txt", "fr-FR/z.txt", "fr-FR/y.txt"]
    assert found["en-US/z.txt"].index("part z") < found["en-US/z.txt"].index("part a")
    assert found["fr-FR/y.txt"] == "une partie avec beaucoup de mots y\n"


def test_a_corpus_is_complete_and_made_once(script: ModuleType, package: str, tmp_path: Path) -> None:
    folder = script.prepare(package, tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {"package": "notes", "version": "1.0", "sha256": hashlib.sha256(b"archive").hexdigest(),
                        "license": "MIT", "files": 2, "bytes": 15}  # fmt: skip
    assert [(d.name, d.text) for d in load_documents(folder)] == [
        ("a.rst.txt", "première"),
        ("deep/b.rst.txt", "second"),
    ]
    assert (folder / "COPYRIGHT").read_text() == "free"
    (folder / "a.rst.txt").unlink()
    assert script.prepare(package, tmp_path / "out") == folder
    assert not (folder / "a.rst.txt").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]


def test_a_wrong_checksum_leaves_nothing(script: ModuleType, package: str, tmp_path: Path) -> None:
    (tmp_path / "notes.deb").write_bytes(b"another")
    found, expected = (hashlib.sha256(content).hexdigest() for content in (b"another", b"archive"))
    with pytest.raises(DataError, match=rf"notes 1\.0: the file has SHA-256 {found}, expected {expected}"):
        script.prepare(package, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_leaves_nothing(
    script: ModuleType, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out/.notes.partial/of a killed run").mkdir(parents=True)
    monkeypatch.setattr(script, "write_texts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.prepare(package, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out/notes").mkdir()
    with pytest.raises(DataError, match="is no corpus of this script"):
        script.prepare(package, tmp_path / "out")


def test_versions_that_are_not_offered(script: ModuleType) -> None:
    name, known = "linux-doc-6.1", "6.1.176-1"
    assert script.choose_version(name, ["7", "6.1.170-3"], any_version=False) == "6.1.170-3"
    assert script.choose_version(name, ["7", "6"], any_version=True) == "7"
    with pytest.raises(DataError, match=rf"offers version 7; known here is {known}.*--any-version takes"):
        script.choose_version(name, ["7"], any_version=False)
    with pytest.raises(DataError, match="apt-get update"):
        script.choose_version(name, [], any_version=True)


def test_missing_and_failing_programs(script: ModuleType) -> None:
    with pytest.raises(DataError, match=r"apt-nowhere is not installed; .* run this on Debian"):
        script.command("apt-nowhere", "download")
    with pytest.raises(DataError, match="failed: E: bad luck"):
        script.command(sys.executable, "-c", "import sys; sys.exit('W: first\\nE: bad luck')")
