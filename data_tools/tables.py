"""Rows of tables as documents: parquet files, The Stack's among them, and JSON lines."""

import collections
import dataclasses
import glob
import io
import json
import math
import pathlib
import urllib.parse
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_tools import remote
from data_tools.dataset import Counted, Failure
from data_tools.units import ContentHashes, Raw, Unit, printable, suffix
from phi1.errors import UserError

if TYPE_CHECKING:
    import pyarrow

FIELDS: dict[str, tuple[str, ...]] = {
    "content": ("content", "text", "code"),
    "path": ("max_stars_repo_path", "path", "file_path"),
    "name": ("max_stars_repo_name", "repo_name", "repo"),
    "licenses": ("max_stars_repo_licenses", "detected_licenses", "licenses", "license"),
    "lang": ("lang", "language"),
    "origin": ("hexsha", "blob_id", "id"),
    "head": ("max_stars_repo_head_hexsha", "revision_id"),
    "stars": ("max_stars_count", "star_events_count", "stars"),
    "authors": ("authors", "author"),
    "url": ("url",),
}
"""What a row of parquet or JSON may say of its document, and the columns in which data sets say it; the first wins."""

TEXTS = {".py": ("Python", False), ".txt": ("Text", True), ".md": ("Markdown", True)}
"""Suffix -> (language, whether it is prose) of files that are one document."""
LINES = (".jsonl", ".jsonl.zst")  # a document a line
_BATCH_BYTES = 16 << 20  # of a row group in memory at a time
_BATCH_ROWS = 64  # at most: a dictionary-encoded cell inflates to any size whatever the file says of its own


def plan_stack(place: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
    return plan_files("stack", place, (), hashes)


def plan_parquet(place: str, any_license: bool, hashes: ContentHashes) -> list[Unit]:
    return plan_files("parquet", place.partition("?")[0], _columns_in(f"parquet:{place}"), hashes)


def _columns_in(source: str) -> tuple[tuple[str, str], ...]:
    """The (field, column) pairs that stand behind a source's ?."""
    query = source.partition("?")[2]
    try:
        pairs = urllib.parse.parse_qsl(query, strict_parsing=True) if query else []
    except ValueError:
        pairs = [("", query)]
    for field, _ in pairs:
        if field not in FIELDS:
            raise UserError(
                f"--sources {source}: after ? stand FIELD=COLUMN pairs with & between; fields: {', '.join(FIELDS)}"
            )
    return tuple(sorted(pairs))


def plan_url(kind: str, place: str, hashes: ContentHashes) -> list[Unit]:
    """Parquet and JSON lines at a URL, `kind`:`place`; columns as for parquet."""
    url, columns = f"{kind}:{place.partition('?')[0]}", _columns_in(f"{kind}:{place}")
    files = remote.find(url, (".parquet", *LINES))
    units = _plan_tables(kind, url, [file for file in files if file.endswith(".parquet")], columns, hashes)
    for file in files:
        if file.endswith(LINES):
            content = remote.content_of(file)
            name = hashes.name(content, _name_of(file, url))
            units.append(Unit("lines", "", name, f"{kind}:{name}", items=(file,), columns=columns, content=content))
    return units


def plan_files(
    kind: str,
    place: str,
    columns: tuple[tuple[str, str], ...],
    hashes: ContentHashes,
    needs: Sequence[Collection[str]] = (FIELDS["content"],),
    read_as: str = "parquet",
) -> list[Unit]:
    """The row groups of parquet files: a file, a folder or a pattern, on disk or at a URL. needs: of each of these, one
    must be a column.
    read_as: the units' kind."""
    if remote.is_url(place):
        return _plan_tables(kind, place, remote.find(place, (".parquet",)), columns, hashes, needs, read_as)
    path = pathlib.Path(place).expanduser()
    matched = [path] if path.is_dir() else map(pathlib.Path, sorted(glob.glob(str(path))))
    # A folder too may be named like a file: one that Spark or Dask wrote.
    found = [file for each in matched for file in (sorted(each.rglob("*.parquet")) if each.is_dir() else [each])]
    files = [str(file) for file in found if file.is_file()]
    if not files:
        raise UserError(f"--sources {kind}:{place}: no parquet file there")
    return _plan_tables(kind, str(path), files, columns, hashes, needs, read_as)


def _plan_tables(
    kind: str,
    place: str,
    files: Sequence[str],
    columns: tuple[tuple[str, str], ...],
    hashes: ContentHashes,
    needs: Sequence[Collection[str]] = (FIELDS["content"],),
    read_as: str = "parquet",
) -> list[Unit]:
    import pyarrow
    import pyarrow.parquet

    units = []
    for file in files:
        try:
            with remote.opened(file) as opened:
                metadata = pyarrow.parquet.read_metadata(opened)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: not a whole parquet file ({_one_line(error)}); fetch it again") from error
        names = metadata.schema.to_arrow_schema().names
        if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
            raise UserError(f"{file}: has more than one column `{twice[0]}`; write it with a name for each")
        for field, column in columns:
            if column not in names:
                raise UserError(f"{file}: has no column `{column}` ({field}); it has {', '.join(names)}")
        for alternatives in needs if "content" not in dict(columns) else ():
            if not set(alternatives) & set(names):
                raise UserError(
                    f"{file}: has no column {' or '.join(f'`{name}`' for name in alternatives)}, but "
                    f"{', '.join(names)}; say which holds the text: parquet:PATH?content=COLUMN"
                )
        groups = metadata.num_row_groups
        content = remote.content_of(file) if remote.is_url(file) else hashes.of(pathlib.Path(file))
        name = hashes.name(content, printable(_name_of(file, place)))
        whole = Unit(read_as, file, name, f"{kind}:{name}", columns=columns, content=content)
        units += [dataclasses.replace(whole, part=(i, groups)) for i in range(groups)]
    return units


def _name_of(file: str, place: str) -> str:
    """A file's path from the folder at `place`, or its name alone if that is none."""
    folder = place.rstrip("/") + "/"
    return file.removeprefix(folder) if file.startswith(folder) else file.rpartition("/")[2]


def _chosen(names: Collection[str], columns: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Field -> column: as the user said, else the first usual one that is there."""
    usual = {field: column for field, known in FIELDS.items() for column in reversed(known) if column in names}
    return usual | dict(columns)


def read_row_group(unit: Unit) -> Iterator[Raw | Failure | Counted]:
    for number, row in enumerate(rows_of_group(unit)):
        yield _raw(row, unit, f"row {number} of group {unit.part[0]}")


def _raw(row: Mapping[str, Any], unit: Unit, place: str) -> Raw:
    """A row of a table as a document. place: its path, if it names none."""
    columns = _chosen(row.keys(), unit.columns)
    values = {field: row.get(column) for field, column in columns.items()}
    return document_of(values, unit.source, place, written=columns.get("content") == "text")


def document_of(values: Mapping[str, Any], source: str, place: str, written: bool = False) -> Raw:
    """The document that has these values of `FIELDS`. place: its path, if it names none. written: whether its content
    is prose where nothing says what it is.
    """
    texts = {field: text_of(values.get(field)) for field in ("path", "name", "lang", "origin", "head", "url")}
    stars, path = values.get("stars"), texts["path"]
    finite = isinstance(stars, int | float) and math.isfinite(stars) and abs(stars) < 2**63
    ending = suffix(path)
    lang, prose = TEXTS.get(ending, ("Python", False))
    if not ending and not texts["lang"]:  # nothing says what it is; data sets call the column of written text so
        prose = written
        lang = "Text" if prose else lang
    permalink = "https://github.com/{name}/blob/{head}/{path}".format(**texts)
    return Raw(
        values.get("content"),
        path or place,
        texts["name"],
        source,
        licenses_in(values.get("licenses")),
        texts["lang"] or lang,
        prose or texts["lang"].lower() in ("markdown", "text", "restructuredtext"),
        origin=texts["origin"] or None,
        head=texts["head"] or None,
        stars=int(stars) if finite else None,  # type: ignore[arg-type]
        authors=licenses_in(values.get("authors")),
        url=texts["url"] or (permalink if path and texts["name"] and texts["head"] else None),
    )


def rows_of_group(unit: Unit, columns: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a parquet row group, a few in memory at a time. columns: those to read, as far as they are there;
    none: what `FIELDS` names. Texts are bytes; a cell that cannot be read is an exception in its place.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with (
            remote.opened(unit.place) as opened,
            pyarrow.parquet.ParquetFile(
                opened,
                pre_buffer=False,
                buffer_size=1 << 20,
                binary_type=pyarrow.large_binary(),  # else a pandas category is checked for UTF-8 as a whole
            ) as file,
        ):
            group, names = file.metadata.row_group(unit.part[0]), file.schema_arrow.names
            each = max(1, group.total_byte_size // max(1, group.num_rows))
            batches = file.iter_batches(
                batch_size=max(1, min(_BATCH_ROWS, _BATCH_BYTES // each)),
                row_groups=[unit.part[0]],
                columns=sorted(set(columns) & set(names) or set(_chosen(names, unit.columns).values())),
                use_threads=False,
            )
            for batch in batches:
                cells = {name: _cells(batch.column(name)) for name in batch.schema.names}
                for i in range(batch.num_rows):
                    yield {name: values[i] for name, values in cells.items()}
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{unit.place}: row group {unit.part[0]} is corrupt ({_one_line(error)}); fetch it again"
        ) from error


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _cells(array: "pyarrow.Array") -> list[Any]:
    import pyarrow
    import pyarrow.types as types

    if isinstance(array, pyarrow.ExtensionArray):  # JSON, which is text
        array = array.storage
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if types.is_string(array.type) or types.is_large_string(array.type) or types.is_string_view(array.type):
        array = array.cast(pyarrow.large_binary())  # whether it is UTF-8 is looked at cell by cell
    unreadable = (ValueError, OverflowError, pyarrow.ArrowException)  # a text inside of a list, a date out of range
    try:
        return array.to_pylist(maps_as_pydicts="lossy")  # a map is a record
    except unreadable:
        pass  # which cell it is
    cells: list[Any] = []
    for cell in array:
        try:
            cells.append(cell.as_py(maps_as_pydicts="lossy"))
        except unreadable as error:
            cells.append(error)
    return cells


def text_of(value: Any) -> str:
    """A cell that should hold a text."""
    if value is None or isinstance(value, Exception):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value).encode("utf-8", "backslashreplace").decode()


def licenses_in(value: Any) -> tuple[str, ...]:
    """Licences (or authors) as data sets write them: a text, a list of them, records with the name in a field, or
    nothing.
    """
    if value is None or isinstance(value, Exception):
        return ()
    if isinstance(value, Mapping):
        named = next((value[key] for key in ("spdx_id", "key", "license", "name") if value.get(key)), None)
        return licenses_in(list(value.values()) if named is None else named)
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(name for item in value for name in licenses_in(item)))
    text = text_of(value).strip()
    return (text,) if text else ()


def read_lines(unit: Unit) -> Iterator[Raw | Failure | Counted]:
    """Documents of a .jsonl or .jsonl.zst file."""
    import pyarrow

    item = unit.items[0]
    path = item if remote.is_url(item) else str(pathlib.Path(unit.place) / item)
    name = printable(item)
    try:
        compression = "zstd" if path.endswith(".zst") else None
        with remote.opened(path) as opened, pyarrow.input_stream(opened, compression=compression) as stream:
            for number, line in enumerate(io.BufferedReader(stream, 1 << 20), 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                except (ValueError, RecursionError) as error:
                    yield Failure(f"{unit.source}/{name} line {number}", f"not JSON: {_one_line(error)[:100]}")
                    continue
                if _chosen(row, unit.columns).get("content") not in row:
                    text, has = dict(unit.columns).get("content") or " or ".join(FIELDS["content"]), ", ".join(row)
                    reason = f"no column {text} ({_one_line(has)[:100] or 'none at all'})"
                    yield Failure(f"{unit.source}/{name} line {number}", reason)
                    continue
                yield _raw(row, unit, f"{name} line {number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read to its end ({_one_line(error)}); fetch it again") from error
