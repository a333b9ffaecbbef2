"""The gold set: snippets of real packages, each read and labelled by itself for its educational value, by a language
model.

`gold.jsonl` holds no code: a line names a package, its version, a file, its lines and their SHA-256, the label from 0
to 10 and the reason in a sentence. The text is read from the package where that version is installed, else from its
wheel, which pip downloads once; a text with another hash is refused. docs/data.md tells how it was labelled and how
well it agrees with itself.
"""

import collections
import dataclasses
import email.message
import email.parser
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence

from phi1.errors import UserError

LABELS = pathlib.Path(__file__).with_name("gold.jsonl")
_PYTHON = "3.11"  # wheels of this version are downloaded, whatever Python runs: only their text is read


@dataclasses.dataclass(frozen=True)
class Snippet:
    """Lines `first` to `last` (from 1, inclusive) of a file. label: 0 (nothing to learn) to 10 (could stand in a
    textbook).

    held_out: never used to choose or tune anything, all snippets of its package alike. again: a second label, given
    without sight of the first.
    """

    package: str
    version: str
    path: str
    first: int
    last: int
    sha256: str
    label: int
    reason: str
    held_out: bool
    again: int | None = None


def load(path: pathlib.Path | None = None) -> list[Snippet]:
    """All snippets. path: a file like gold.jsonl; none: that one."""
    snippets = []
    for line in (path or LABELS).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        first, last = row.pop("lines")
        snippets.append(Snippet(first=first, last=last, **row))
    return snippets


def texts(
    snippets: Sequence[Snippet], cache: pathlib.Path | None = None
) -> Iterator[tuple[Snippet, str, email.message.Message]]:
    """Each snippet with its text and its package's metadata, package by package.

    cache: folder for wheels; none: phi1/packages in the cache folder of the XDG base directory specification. Raises
    UserError for a package that is neither installed in that version nor can be downloaded, and for a text that is not
    the labelled one.
    """
    by_package: dict[tuple[str, str], list[Snippet]] = collections.defaultdict(list)
    for snippet in snippets:
        by_package[snippet.package, snippet.version].append(snippet)
    for (package, version), members in by_package.items():
        read, metadata = _installed(package, version) or _wheel(package, version, cache or _cache())
        files = {path: read(path).decode().split("\n") for path in sorted({snippet.path for snippet in members})}
        for snippet in members:
            text = "\n".join(files[snippet.path][snippet.first - 1 : snippet.last])
            if digest(text) != snippet.sha256:
                raise UserError(
                    f"{package} {version}: lines {snippet.first} to {snippet.last} of {snippet.path} are not those "
                    f"that were labelled; the package was changed, install it again"
                )
            yield snippet, text, metadata


def digest(text: str) -> str:
    """SHA-256 of a snippet's text, by which its label is found."""
    return hashlib.sha256(text.encode()).hexdigest()


_Package = tuple[Callable[[str], bytes], email.message.Message]


def _installed(package: str, version: str) -> _Package | None:
    """How to read a file of the installed package, if that version is."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != version:
        return None

    def read(path: str) -> bytes:
        return pathlib.Path(str(distribution.locate_file(path))).read_bytes()

    metadata = email.parser.Parser().parsestr(distribution.read_text("METADATA") or "")
    return functools.partial(_file, package, version, read), metadata


def _wheel(package: str, version: str, cache: pathlib.Path) -> _Package:
    """How to read a file of the package's wheel, downloaded if it is not in the cache."""
    wheels = _wheels(package, version, cache)
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += [
            "--only-binary",
            ":all:",
            "--python-version",
            _PYTHON,
            "--dest",
            str(cache),
            f"{package}=={version}",
        ]
        print(f"gold: downloading {package} {version}", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = _wheels(package, version, cache)
        if done.returncode or not wheels:
            why = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise UserError(
                f"{package} {version}, which the gold set quotes, is not installed and cannot be downloaded ({why}); "
                f"pip install --no-deps {package}=={version}, or annotate with a model instead"
            )
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            files = {
                name: archive.read(name) for name in archive.namelist() if name.endswith((".py", ".dist-info/METADATA"))
            }
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheels[0]}: cannot be read ({error}); delete it, it is downloaded again") from error

    def read(path: str) -> bytes:
        return files[next((name for name in files if name.endswith((f"/purelib/{path}", f"/platlib/{path}"))), path)]

    metadata = next((text for name, text in files.items() if name.endswith("METADATA")), b"")
    return functools.partial(_file, package, version, read), email.parser.BytesParser().parsebytes(metadata)


def _file(package: str, version: str, read: Callable[[str], bytes], path: str) -> bytes:
    try:
        return read(path)
    except (OSError, KeyError) as error:
        raise UserError(f"{package} {version}: has no {path}; the package was changed, install it again") from error


def _wheels(package: str, version: str, cache: pathlib.Path) -> list[pathlib.Path]:
    stem = package.replace("-", "_").lower()
    return sorted(path for path in cache.glob(f"*-{version}-*.whl") if path.name.lower().startswith(f"{stem}-"))


def _cache() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (pathlib.Path(root) if os.path.isabs(root) else pathlib.Path.home() / ".cache") / "phi1" / "packages"
