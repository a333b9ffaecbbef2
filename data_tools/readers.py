"""Readers: where documents come from.

A source is written "kind:place":

    stdlib                            the running interpreter's standard library, without its tests
    pypi:networkx                     an installed distribution's Python files, without its tests
    gold                              the snippets of the gold set (`gold.py`), from the packages that they quote
    folder:PATH                       all files under PATH that are .py, .txt, .md, .jsonl or .jsonl.zst
    stack:PATH                        The Stack's parquet files: a file, a folder or a glob
    parquet:PATH?FIELD=COLUMN&…       other parquet files; a field (`tables.FIELDS`) that is not named is looked for by
                                      its usual columns, e.g. parquet:/data/edu/*.parquet?content=text
    hf://datasets/…, s3://BUCKET/…    parquet and JSON lines there: a file, a folder or a pattern, with ?FIELD=COLUMN
                                      as above (`remote.py`)
    stack-edu, cosmopedia-v2, …       a published data set by its name in `data_sets.DATA_SETS`, or NAME:PLACE for a
                                      copy of it
    stackoverflow:PATH/Posts.xml      the public dump: question and best answer as one document

`plan(sources)` splits them into units (a list of files, a parquet row group, a part of the questions), each
read alone, in any process: `read(unit, spool, tag)` yields raw documents, failures and counters. A unit knows its
content by hash; where it lies and when it was written is no part of what it is. A bad value is the failure of its
document.
"""

import collections
import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

from data_tools import gold, remote
from data_tools.data_sets import DATA_SETS, plan_data_set, read_data_set, unknown
from data_tools.dataset import Counted, Failure
from data_tools.stackoverflow import plan_posts, read_questions
from data_tools.tables import LINES, TEXTS, plan_parquet, plan_stack, plan_url, read_lines, read_row_group
from data_tools.units import ContentHashes, Raw, Unit, printable, suffix
from phi1.errors import UserError
from phi1.files import sha256_file, sha256_json

UNIT_BYTES = 32 << 20  # of source files in one unit: a shard of about that size
_GOLD_PART = 100  # snippets in one: 5 s to embed on a core
_PERMISSIVE = re.compile(
    r"\b(mit|bsd|apache|isc|psf|python-2\.0|python software foundation|unlicense|zlib|0bsd|cc0|public domain|hpnd)\b",
    re.I,
)
_COPYLEFT = re.compile(r"\b(gpl|agpl|lgpl|gnu|gplv\d|lgplv\d)", re.I)


def plan(sources: Sequence[str], hashes: ContentHashes, *, any_license: bool = False) -> list[Unit]:
    """The units of all sources.

    Raises UserError for a source that is not there, or (unless any_license) under no known permissive licence.
    """
    units: list[Unit] = []
    for source in sources:
        kind, _, place = source.partition(":")
        if kind in DATA_SETS:
            units += plan_data_set(kind, place, hashes)
        elif remote.is_url(source):
            units += plan_url(kind, place, hashes)
        elif kind not in _PLANNERS or (place == "") != (kind in ("stdlib", "gold")):
            raise unknown(source)
        else:
            units += _PLANNERS[kind](place, any_license, hashes)
    return units


def read(unit: Unit, spool: pathlib.Path, tag: str) -> Iterator[Raw | Failure | Counted]:
    """The documents of one unit, in a fixed order. spool: the folder that `spooled` filled for `tag`."""
    if unit.kind == "parquet":
        yield from read_row_group(unit)
    elif unit.kind in DATA_SETS:
        yield from read_data_set(unit)
    elif unit.kind == "lines":
        yield from read_lines(unit)
    elif unit.kind == "stackoverflow":
        yield from read_questions(unit, spool, tag)
    elif unit.kind == "gold":
        yield from _read_gold(unit)
    else:
        yield from _read_files(unit)


# Files: the standard library, installed distributions, folders.


def _plan_stdlib(_: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    version = ".".join(map(str, sys.version_info[:3]))
    files = _under(root, (".py",), skipped=("site-packages", "dist-packages", "__pycache__"))
    sized = [(name, os.path.getsize(root / name)) for name in files if not _is_test(name)]
    unit = Unit("stdlib", str(root), "cpython", f"stdlib:cpython=={version}", ("PSF-2.0",))
    return _split(unit, sized)


def _plan_distribution(name: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"--sources pypi:{name}: that package is not installed; pip install {name}") from error
    licenses = _licenses(distribution.metadata)
    known = [text for text in licenses if _PERMISSIVE.search(text) and not _COPYLEFT.search(text)]
    if not any_license and (not licenses or len(known) < len(licenses)):
        raise UserError(
            f"--sources pypi:{name}: its licence ({', '.join(licenses) or 'none stated'}) is not known as permissive; "
            "leave it out, or pass --any-license"
        )
    root = pathlib.Path(str(distribution.locate_file("")))
    names = sorted(name for name in map(str, distribution.files or []) if name.endswith(".py"))
    sized = [
        (name, os.path.getsize(root / name))
        for name in names
        if not name.startswith("..") and not _is_test(name) and os.path.exists(root / name)
    ]
    if not sized:
        raise UserError(f"--sources pypi:{name}: has no Python files; leave it out")
    unit = Unit("pypi", str(root), name, f"pypi:{name}=={distribution.version}", tuple(licenses))
    return _split(unit, sized)


def _plan_gold(_: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
    """Whole packages, so many that a part is worth a core where it is embedded."""
    parts: list[list[str]] = [[]]
    size = 0
    for package, snippets in collections.Counter(snippet.package for snippet in gold.load()).items():
        if size >= _GOLD_PART:
            parts.append([])
            size = 0
        parts[-1].append(package)
        size += snippets
    whole = Unit("gold", "", "gold", "gold", content=sha256_file(gold.LABELS))
    return [dataclasses.replace(whole, items=tuple(packages), part=(i, len(parts))) for i, packages in enumerate(parts)]


def _plan_folder(place: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
    root = pathlib.Path(place).expanduser()
    if not root.is_dir():
        raise UserError(f"--sources folder:{place}: no folder there")
    files = [name for name in _under(root, (*TEXTS, *LINES)) if os.path.isfile(root / name)]
    if not files:
        raise UserError(f"--sources folder:{place}: no {', '.join((*TEXTS, *LINES))} file in it")
    whole = Unit("folder", str(root), "", "folder")
    sized = [(name, os.path.getsize(root / name)) for name in files if not name.endswith(LINES)]
    units = _split(whole, sized) if sized else []
    for name in files:
        if name.endswith(LINES):
            units.append(dataclasses.replace(whole, kind="lines", items=(name,), content=hashes.of(root / name)))
    name = hashes.name(sha256_json([unit.content for unit in units]), printable(root.resolve().name))
    return [dataclasses.replace(unit, name=name, source=f"folder:{name}") for unit in units]


def _licenses(metadata: Any) -> list[str]:
    """Licences from a distribution's metadata: the SPDX expression, else the classifiers, else the free text."""
    if expression := metadata.get("License-Expression"):
        return [expression]
    prefix = "License :: "
    classifiers = [text for text in metadata.get_all("Classifier") or [] if text.startswith(prefix)]
    if classifiers:
        return [text.split(" :: ")[-1] for text in classifiers]
    first_line = (metadata.get("License") or "").strip().split("\n")[0]
    return [first_line] if 0 < len(first_line) <= 100 else []


def _under(root: pathlib.Path, endings: tuple[str, ...], skipped: Sequence[str] = ()) -> list[str]:
    """The files below a folder whose names end so, by their paths from there, folder by folder. skipped: folders not
    looked into. What else is not looked into is said.
    """
    found = []
    left: list[str] = []

    def unreadable(error: OSError) -> None:
        left.append(f"{error.filename} cannot be read ({error.strerror})")

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if name not in skipped]
        links = [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
        left += [f"{path} is a link, which is not followed: make it a source of its own" for path in links]
        place = os.path.relpath(folder, root)
        found += [name if place == "." else f"{place}/{name}" for name in names if name.endswith(endings)]
    if left:
        more = f" (and {len(left) - 1:,} more)" if len(left) > 1 else ""
        print(f"warning: ingest: a folder is left out: {printable(left[0])}{more}", file=sys.stderr)
    return sorted(found, key=lambda name: name.split("/"))


def _is_test(file: str) -> bool:
    """Tests are left out: long, repetitive, and written for the machine."""
    *folders, name = file.split("/")
    return bool({"test", "tests", "idle_test"} & set(folders)) or name.startswith("test_")


def _split(unit: Unit, sized: Sequence[tuple[str, int]]) -> list[Unit]:
    parts: list[list[str]] = [[]]
    size = 0
    for name, length in sized:
        if parts[-1] and size + length > UNIT_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += length
    return [
        dataclasses.replace(unit, items=tuple(part), part=(i, len(parts)), content=_content_of(unit.place, part))
        for i, part in enumerate(parts)
    ]


def _content_of(place: str, items: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for item in items:
        try:
            content = sha256_file(pathlib.Path(place) / item)
        except OSError:
            content = "cannot be read"
        digest.update(f"{printable(item)}\0{content}\0".encode())
    return digest.hexdigest()


def _read_files(unit: Unit) -> Iterator[Raw | Failure | Counted]:
    for item in unit.items:
        name = printable(item)
        try:
            with open(os.path.join(unit.place, item), "rb", buffering=0) as file:
                content = file.readall()
        except OSError as error:
            yield Failure(f"{unit.source}/{name}", f"cannot be read: {error.strerror}")
            continue
        lang, prose = TEXTS[suffix(item)]
        yield Raw(content, name, unit.name, unit.source, unit.licenses, lang, prose)


def _read_gold(unit: Unit) -> Iterator[Raw]:
    mine = [snippet for snippet in gold.load() if snippet.package in unit.items]
    for snippet, text, metadata in gold.texts(mine):
        place = f"{snippet.path}#L{snippet.first}-L{snippet.last}"
        source = f"gold:{snippet.package}=={snippet.version}"
        yield Raw(text, place, snippet.package, source, tuple(_licenses(metadata)))


_PLANNERS = {
    "stdlib": _plan_stdlib,
    "pypi": _plan_distribution,
    "gold": _plan_gold,
    "folder": _plan_folder,
    "stack": plan_stack,
    "parquet": plan_parquet,
    "stackoverflow": plan_posts,
}
