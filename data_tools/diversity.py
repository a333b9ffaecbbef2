"""How different the texts of a dataset are, once what differs in any case is masked: names, constants, examples.

A row's text is read as tokens (`mask`), in which every name that its code binds is one symbol, as is every number and
every string, and from which doctests' examples are gone. On these:

near twin     a row whose 5-grams of tokens have a Jaccard index of at least 0.75 with those of an earlier row (n and
              threshold are FineWeb's). Candidates are found by MinHash and compared exactly: of twins at just 0.75,
              98% are found, of those at 0.85 all but 1 in 20,000. The share grows with the sample: it is told by size.
shapes        different sequences of node types among the functions (data_tools/similarity.py, preorder)
distinct-n    different n-grams over all n-grams
compression   bytes over bytes of gzip, of the masked text: higher is more of the same (Shaib et al., arXiv 2403.00553)
Vendi score   exp of the entropy of the eigenvalues of K / n (Friedman and Dieng, arXiv 2210.02410): the number of rows
              that would be as diverse if they had nothing in common. K: cosine of the counts of 1- to 3-grams.
"""

import ast
import collections
import dataclasses
import hashlib
import json
import pathlib
import random
import re
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_tools import python_text, similarity
from data_tools.dataset import Dataset, reading
from phi1.errors import UserError
from phi1.files import write_json

if TYPE_CHECKING:
    import numpy

FILE = "diversity.json"
NGRAM = 5
JACCARD = 0.75
BANDS, BAND_ROWS = 21, 6
"""Hashes in a band, which all must agree for a candidate, and bands, of which one must."""
DISTINCT = (1, 2, 3)
LARGEST_VENDI = 2000
"""Rows: kernel and eigenvalues take 2 s of a core for so many, and eight times that for twice as many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 data diversity`."""

    input: pathlib.Path
    """Dataset with a column `content`."""

    rows: int = 20_000
    """Look at so many rows, drawn at random, in a random order."""

    seed: int = 0
    """Seed of that choice."""

    output: pathlib.Path | None = None
    """The measurement as JSON; diversity.json in the dataset's folder if none is given."""


def run(config: Config) -> dict[str, Any]:
    """Measures a dataset, prints a table and writes it as JSON."""
    if config.rows < 1:
        raise UserError(f"--rows {config.rows}: must be at least 1")
    dataset = Dataset(config.input)
    if not dataset.rows:
        raise UserError(f"{config.input}: holds no rows")
    if "content" not in dataset.table(0).schema.names:
        raise UserError(f"{config.input}: has no column content")
    rng = random.Random(config.seed)
    chosen = set(rng.sample(range(dataset.rows), min(config.rows, dataset.rows)))
    texts = [row["content"] or "" for i, row in enumerate(dataset.read(["content"])) if i in chosen]
    rng.shuffle(texts)
    measured = measure(texts) | {"dataset": dataset.hash, "rows_in_dataset": dataset.rows, "seed": config.seed}
    write_json(config.output or config.input / FILE, measured)
    print(describe(measured))
    return measured


def describe(measured: dict[str, Any]) -> str:
    """The measurement as a table, a line for each size of the sample."""
    head = ["rows", "near twins", "shapes", *(f"distinct-{n}" for n in DISTINCT), "compression", "Vendi"]
    lines = ["".join(f"{title:>12}" for title in head)]
    for point in measured["points"]:
        vendi = point.get("vendi")
        cells = [
            f"{point['rows']:,}",
            f"{100 * point['near_twins']:.1f}%",
            f"{point['shapes']:,}",
            *(f"{point[f'distinct_{n}']:.4f}" for n in DISTINCT),
            f"{point['compression']:.2f}",
            "–" if vendi is None else f"{vendi:.1f}",
        ]
        lines.append("".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


# ---------------------------------------------------------------- masking

_TOKEN = re.compile(r"\w+|[^\w\s]")
_EXAMPLE = re.compile(
    r"^[ \t]*>>> .*\n(?:[ \t]*\.\.\. .*\n)*(?:(?![ \t]*(?:>>>|\"\"\"|'''))[ \t]*\S.*\n)*", re.MULTILINE
)
_STRING = re.compile(r"'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\"")
_WORD_OR_NUMBER = re.compile(r"\w+(?:(?<=\d)\.\d+)?")


def mask(text: str) -> list[str]:
    """A text's tokens, lower case, with each name that its code binds as `_`, each number as `0`, each string as `"`;
    without doctests' examples and the quotes of docstrings."""
    names = bound_names(text)
    text = _EXAMPLE.sub("", text).replace('"""', " ").replace("'''", " ")
    text = _STRING.sub(' " ', text)

    def symbol(match: re.Match[str]) -> str:
        found = match[0]
        return "_" if found in names else "0" if found[0].isdigit() else found.lower()

    return _TOKEN.findall(_WORD_OR_NUMBER.sub(symbol, text))


def bound_names(text: str) -> set[str]:
    """Names of functions, classes, arguments, variables and attributes that code in the text binds."""
    whole = python_text.parse(textwrap.dedent(text))
    names: set[str] = set()
    for tree in [whole] if whole else python_text.find(text).functions:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


def ngrams(tokens: Sequence[str], n: int) -> list[str]:
    """Runs of n tokens; a shorter text is one."""
    return [" ".join(tokens[i : i + n]) for i in range(max(1, len(tokens) - n + 1))]


# ---------------------------------------------------------------- near twins


class _TokenHashes(dict[str, int]):
    """Token -> 64 bits, made when it is first asked for."""

    def __missing__(self, token: str) -> int:
        digest = hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[token] = value = int.from_bytes(digest, "big")
        return value


class Twins:
    """Finds near twins as texts come, one after another. A gram is known by 64 bits."""

    def __init__(self) -> None:
        import numpy

        rng = numpy.random.default_rng(0)
        size = BANDS * BAND_ROWS
        self._multiply = rng.integers(0, 2**32, (size, 1), dtype=numpy.uint32) | numpy.uint32(1)
        self._add = rng.integers(0, 2**32, (size, 1), dtype=numpy.uint32)
        self._powers = [numpy.uint64(pow(0x9E3779B97F4A7C15, i, 2**64)) for i in range(NGRAM)]
        self._tokens = _TokenHashes()
        self._texts: list[numpy.ndarray] = []
        self._buckets: dict[tuple[int, bytes], list[int]] = collections.defaultdict(list)
        self._same: dict[bytes, int] = {}

    def add(self, tokens: Sequence[str]) -> int | None:
        """The number, from 0, of an earlier text of which this is a near twin; None if there is none."""
        grams = self._grams(tokens)
        number = len(self._texts)
        self._texts.append(grams)
        if (same := self._same.setdefault(grams.tobytes(), number)) != number:
            return same  # its buckets hold that one already
        twin = None
        compared: set[int] = set()
        for key in self._keys(grams):
            bucket = self._buckets[key]
            for other in bucket if twin is None else ():
                if other not in compared:
                    compared.add(other)
                    if jaccard(grams, self._texts[other]) >= JACCARD:
                        twin = other
                        break
            bucket.append(number)
        return twin

    def _grams(self, tokens: Sequence[str]) -> "numpy.ndarray":
        """(different grams,) uint64, sorted: a polynomial in the hashes of each run of NGRAM tokens; a shorter text is
        one.
        """
        import numpy

        hashes = numpy.fromiter(map(self._tokens.__getitem__, tokens), numpy.uint64, len(tokens))
        grams = numpy.zeros(max(1, len(hashes) - NGRAM + 1), dtype=numpy.uint64)
        for i in range(min(NGRAM, len(hashes))):
            grams += hashes[i : i + len(grams)] * self._powers[i]
        grams.sort()
        return grams[numpy.append(True, grams[1:] != grams[:-1])]

    def _keys(self, grams: "numpy.ndarray") -> list[tuple[int, bytes]]:
        """Of each band, the smallest values of its hash functions: x -> a x + b on the upper halves of the grams."""
        import numpy

        values = self._multiply * (grams >> numpy.uint64(32)).astype(numpy.uint32)
        values += self._add
        return [(band, row.tobytes()) for band, row in enumerate(values.min(1).reshape(BANDS, BAND_ROWS))]


def jaccard(left: "numpy.ndarray", right: "numpy.ndarray") -> float:
    """Shared over all, of two sets, each an array of different values."""
    import numpy

    shared = len(numpy.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


# ---------------------------------------------------------------- the measurement


def sizes(rows: int) -> list[int]:
    """Sample sizes 100, 200, 500, 1,000 … below `rows`, and `rows`."""
    found = [step * 10**power for power in range(2, 10) for step in (1, 2, 5)]
    return [size for size in found if size < rows] + [rows]


def measure(texts: Sequence[str]) -> dict[str, Any]:
    """Everything in the module's docstring, for the first texts of each of `sizes`."""
    twins, shapes = Twins(), set[str]()
    counts = {n: (set[str](), [0]) for n in DISTINCT}
    masked = [mask(text) for text in texts]
    found = 0
    points: list[dict[str, Any]] = []
    wanted = set(sizes(len(texts)))
    for i, tokens in enumerate(masked, 1):
        found += twins.add(tokens) is not None
        shapes |= set(_shapes(texts[i - 1]))
        for n, (different, total) in counts.items():
            grams = ngrams(tokens, n)
            different.update(grams)
            total[0] += len(grams)
        if i in wanted:
            point: dict[str, Any] = {"rows": i, "near_twins": found / i, "shapes": len(shapes)}
            point |= {f"distinct_{n}": len(different) / total[0] for n, (different, total) in counts.items()}
            point["compression"] = compression(masked[:i])
            if i <= LARGEST_VENDI:
                point["vendi"] = vendi(masked[:i])
            points.append(point)
    return {"ngram": NGRAM, "jaccard": JACCARD, "points": points}


def _shapes(text: str) -> Iterator[str]:
    for function in python_text.find(text).functions:
        yield similarity.serialise(function)


def compression(masked: Iterable[Sequence[str]]) -> float:
    """Bytes of the masked texts over those of their zlib form."""
    data = "\n".join(" ".join(tokens) for tokens in masked).encode()
    return len(data) / len(zlib.compress(data, 9))


def vendi(masked: Sequence[Sequence[str]]) -> float:
    """The Vendi score of masked texts, 1 to their number."""
    import scipy.sparse

    columns: dict[str, int] = {}
    places: list[int] = []
    ends = [0]
    for tokens in masked:
        for n in (1, 2, 3):
            places += [columns.setdefault(gram, len(columns)) for gram in ngrams(tokens, n)]
        ends.append(len(places))
    matrix = scipy.sparse.csr_array(([1.0] * len(places), places, ends), shape=(len(masked), len(columns)))
    matrix.sum_duplicates()  # counts: the product takes the square of a column's entries
    return score((matrix @ matrix.T).toarray())


def score(kernel: "numpy.ndarray") -> float:
    """The Vendi score of a matrix of inner products, scaled to a diagonal of ones."""
    import numpy

    scale = numpy.sqrt(numpy.diagonal(kernel))
    values = numpy.linalg.eigvalsh(kernel / scale[:, None] / scale / len(kernel))
    values = values[values > 1e-12]
    return float(numpy.exp(-(values * numpy.log(values)).sum()))


def read(folder: pathlib.Path) -> dict[str, Any] | None:
    """The measurement of the dataset in a folder, if there is one and it is of what the folder holds now."""
    path = folder / FILE
    if not path.exists():
        return None
    with reading(path, "delete it and run `phi1 data diversity` again"):
        measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        measured["dataset"], describe(measured)
    return measured if measured["dataset"] == Dataset(folder).hash else None
