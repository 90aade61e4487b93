"""Make training text from Debian's documentation packages.

    python examples/prepare_corpora.py --list
    python examples/prepare_corpora.py --out corpora python3.11-doc    # without names: all of them
    wkv train corpora/python3.11-doc

Each package is fetched by name and version with `apt-get download`, which needs no root, checked against the SHA-256
below, and unpacked with `dpkg-deb` into a temporary folder. A corpus is a folder of UTF-8 texts with `manifest.json`
and the package's own `COPYRIGHT`; it gets its name when it is complete, so the script may be interrupted and called
again. The texts stay under the licenses of their packages.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from wkv.errors import DataError

Texts = Iterator[tuple[str, str]]  # names below the corpus folder, and texts

# ---------------------------------------------------------------- HTML to text

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
BLOCKS = {"blockquote", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "li", "ol", "p", "pre", "table",
          "tr", "ul"}  # fmt: skip
HIDDEN = {"head", "nav", "script", "style", "svg"}  # elements,
HIDDEN_MARKS = {"banner", "docnav", "toc"}  # classes and ids,
HIDDEN_PLACES = {("p", "title")}  # and (element, id)


class Reader(HTMLParser):
    """The readable text of an XHTML page, without navigation and tables of contents, and its `<link rel=... href=...>`.

    `paragraphs` are in the order of the page; blanks are single except within `pre`. `links` maps rel to href.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.links: dict[str, str] = {}
        self._piece: list[str] = []
        self._hidden = 0  # depth inside a hidden element
        self._fixed = 0  # depth inside `pre`

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin an element."""
        given = {name: value or "" for name, value in attrs}
        if tag == "link":
            self.links.setdefault(given.get("rel", ""), given.get("href", ""))
        if tag in VOID:
            self._piece.append("\n" if tag == "br" and self._fixed else " ")
            return
        marks = {*given.get("class", "").split(), given.get("id", "")}
        if self._hidden or tag in HIDDEN or marks & HIDDEN_MARKS or (tag, given.get("id")) in HIDDEN_PLACES:
            self._hidden += 1
        elif tag in BLOCKS:
            self._end_paragraph()
            self._fixed += tag == "pre"
        elif tag in ("td", "th"):
            self._piece.append(" ")

    def handle_endtag(self, tag: str) -> None:
        """End an element."""
        if tag in VOID:
            return
        if self._hidden:
            self._hidden -= 1
        elif tag in BLOCKS:
            self._end_paragraph()
            self._fixed -= tag == "pre"

    def handle_data(self, data: str) -> None:
        """Text between tags."""
        if not self._hidden:
            self._piece.append(data)

    def _end_paragraph(self) -> None:
        text = "".join(self._piece)
        self._piece = []
        text = text.strip("\n").rstrip() if self._fixed else " ".join(text.split())
        if text.strip():
            self.paragraphs.append(text)


def read_html(text: str) -> Reader:
    """The parsed page."""
    reader = Reader()
    reader.feed(text)
    reader.close()
    reader._end_paragraph()
    return reader


def html_chapters(folder: Path) -> dict[str, list[str]]:
    """Chapters of a book of linked pages -> paragraphs, in reading order.

    Pages name the one after them (`next`) and the one above (`up`); those below `index.html` are chapters.
    """
    pages = {path.name: read_html(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.html"))}
    chapters: dict[str, list[str]] = {}
    for name in reading_order(pages):
        top, above = name, pages[name].links.get("up", "index.html")
        while above in pages and above != "index.html":
            top, above = above, pages[above].links.get("up", "index.html")
        chapters.setdefault(top.removesuffix(".html"), []).extend(pages[name].paragraphs)
    return chapters


def reading_order(pages: dict[str, Reader]) -> Iterator[str]:
    """Names of pages from `index.html`, the title page, which is left out, by `next` to the last."""
    seen, name = {"index.html"}, pages["index.html"].links.get("next", "")
    while name in pages and name not in seen:
        yield name
        seen.add(name)
        name = pages[name].links.get("next", "")


# ---------------------------------------------------------------- packages to texts


def python_texts(root: Path) -> Texts:
    """The reStructuredText sources of the Python documentation, as they are."""
    folder = root / "usr/share/doc/python3.11/html/_sources"
    return raw_texts(folder, [".txt"])


def linux_texts(root: Path) -> Texts:
    """The kernel's documentation: .rst and .txt as they are, not .yaml, which describes hardware to programs."""
    return raw_texts(root / "usr/share/doc/linux-doc-6.1/Documentation", [".rst.gz", ".txt.gz"])


def raw_texts(folder: Path, suffixes: Iterable[str]) -> Texts:
    """All files with one of the suffixes, unpacked."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name.endswith(tuple(suffixes)):
            content = path.read_bytes()
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", "replace")
            name = path.relative_to(folder).as_posix().removesuffix(".gz").removesuffix(".txt")
            yield f"{name}.txt", text


def handbook_texts(root: Path) -> Texts:
    """One text per language and chapter. What a translation leaves in English is left out of it.

    Where two thirds of a language are missing it is left out as a whole.
    """
    folder = root / "usr/share/doc/debian-handbook/html"
    english = html_chapters(folder / "en-US")
    known = {text for paragraphs in english.values() for text in paragraphs}
    for path in sorted(folder.iterdir()):
        chapters = english if path.name == "en-US" else translated(html_chapters(path), known)
        if size(chapters) * 3 >= size(english):
            for name, paragraphs in chapters.items():
                yield f"{path.name}/{name}.txt", "\n\n".join(paragraphs) + "\n"


def translated(chapters: dict[str, list[str]], english: set[str]) -> dict[str, list[str]]:
    """The chapters without the paragraphs that are the English ones."""
    return {name: [text for text in paragraphs if text not in english] for name, paragraphs in chapters.items()}


def size(chapters: dict[str, list[str]]) -> int:
    """Number of bytes in UTF-8."""
    return sum(len(text.encode()) for paragraphs in chapters.values() for text in paragraphs)


@dataclass(frozen=True)
class Package:
    """A Debian package: its versions with the SHA-256 of their files, its license, and how its texts are found."""

    versions: dict[str, str]
    license: str
    texts: Callable[[Path], Texts]


PACKAGES = {
    "python3.11-doc": Package(
        {"3.11.2-6+deb12u8": "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b"},
        "PSF-2.0", python_texts,
    ),
    "debian-handbook": Package(
        {"11.20220922": "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"},
        "GPL-2.0-or-later or CC-BY-SA-3.0", handbook_texts,
    ),
    "linux-doc-6.1": Package(
        {"6.1.176-1": "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f",
         "6.1.170-3": "8a0e80e4f14407d0d96058b9eec7afa4ae57e6408d3f4e2bed35462d14b99342"},
        "GPL-2.0 (some files others)", linux_texts,
    ),
}  # fmt: skip

# ---------------------------------------------------------------- fetching


def command(*words: str | Path, folder: Path | None = None) -> str:
    """Run a program; its output.

    Raises:
        DataError: if it is missing or fails, with the last line it wrote.
    """
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise DataError(f"{words[0]} is not installed; the corpora are made of Debian packages: run this on Debian or "
                        "Ubuntu, or in a container of one") from error  # fmt: skip
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise DataError(f"{' '.join(map(str, words))} failed: {lines[-1]}")
    return done.stdout


def choose_version(name: str, offered: list[str], any_version: bool) -> str:
    """The version to fetch of those that the system offers.

    Raises:
        DataError: if it offers none that is known here.
    """
    known = PACKAGES[name].versions
    if not offered:
        raise DataError(f"apt knows no package {name}; `apt-get update` as root gets its lists. It is in Debian 12")
    for version in (*known, *(offered if any_version else ())):
        if version in offered:
            return version
    raise DataError(f"{name}: this system offers version {', '.join(offered)}; known here is {', '.join(known)}. "
                    "--any-version takes the offered one, and the manifest says which it was")  # fmt: skip


def check(name: str, version: str, path: Path) -> str:
    """The SHA-256 of a package's file.

    Raises:
        DataError: if it is not the one of this version.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    expected = PACKAGES[name].versions.get(version, found)
    if found != expected:
        raise DataError(
            f"{name} {version}: the file has SHA-256 {found}, expected {expected}. It is damaged or not Debian's, and "
            "nothing was made of it. Fetch it again, or look at where apt gets its packages from"
        )
    return found


def fetch(name: str, folder: Path, any_version: bool) -> tuple[Path, str]:
    """Download a package into `folder`: (file, version)."""
    lines = command("apt-cache", "madison", name).splitlines()
    offered = list(dict.fromkeys(parts[1].strip() for line in lines if len(parts := line.split("|")) > 2))
    version = choose_version(name, offered, any_version)
    say(f"{name} {version}: fetching")
    command("apt-get", "download", "--quiet", f"{name}={version}", folder=folder)
    return next(folder.glob("*.deb")), version


# ---------------------------------------------------------------- a corpus


def prepare(name: str, out: Path, any_version: bool = False) -> Path:
    """Make the corpus `out/name`, if it is not there.

    Returns:
        Its folder.

    Raises:
        DataError: if the package cannot be had, or the folder not be written.
    """
    final, work = out / name, out / f".{name}.partial"
    if (final / "manifest.json").is_file():
        say(f"{final} is there already; delete it to make it anew")
        return final
    if final.exists():
        raise DataError(f"{final} is there, but is no corpus of this script; choose another --out")
    try:
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        work.mkdir(parents=True)
        package, version = fetch(name, work, any_version)
        manifest = {"package": name, "version": version, "sha256": check(name, version, package),
                    "license": PACKAGES[name].license}  # fmt: skip
        say(f"{name} {version}: unpacking")
        command("dpkg-deb", "-x", package, work / "root")
        shutil.copy(work / "root/usr/share/doc" / name / "copyright", folder_for(work / "text") / "COPYRIGHT")
        manifest |= write_texts(PACKAGES[name].texts(work / "root"), work / "text", name)
        (work / "text/manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        os.replace(work / "text", final)
    except OSError as error:
        raise DataError(f"{final} cannot be made: {error.strerror or error}; nothing is left of it") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"{final}: {manifest['files']:,} files, {manifest['bytes']:,} bytes, license {manifest['license']}")
    return final


def write_texts(texts: Texts, folder: Path, name: str) -> dict[str, int]:
    """Write the texts that are not empty; how many files and bytes there are."""
    files = size = 0
    for path, text in texts:
        if text.strip():
            folder_for((folder / path).parent).joinpath(Path(path).name).write_text(text, encoding="utf-8", newline="")
            files, size = files + 1, size + len(text.encode())
            if sys.stderr.isatty():
                print(f"\r{name}: {files:,} files, {size:,} bytes ", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return {"files": files, "bytes": size}


def folder_for(path: Path) -> Path:
    """`path`, made if need be."""
    path.mkdir(parents=True, exist_ok=True)
    return path


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def show() -> None:
    """Print the table of packages."""
    for name, package in PACKAGES.items():
        say(f"{name:16} {package.license}")
        for version, checksum in package.versions.items():
            say(f"    {version:18} sha256 {checksum}")


def main() -> None:
    """Make the corpora named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PACKAGES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("corpora"), help="where to (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print packages, versions, checksums and licenses")
    parser.add_argument("--any-version", action="store_true", help="take a version without a known checksum as well")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in PACKAGES]
    if unknown:
        parser.error(f"no corpus {unknown[0]!r}; there are {', '.join(PACKAGES)}")
    if arguments.list:
        return show()
    try:
        for name in arguments.names or PACKAGES:
            prepare(name, arguments.out, arguments.any_version)
    except DataError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; corpora that were complete stay, call it again for the rest", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
