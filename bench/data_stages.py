"""What bench/data.py measures: inputs that are made here, the stages, and for each its candidates."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("networkx", "sympy", "boltons", "toolz")
STACK_ROWS = 1000
"""Rows of a row group, as in The Stack."""
CONCURRENCY = 32
TREES = 500
ANSWER_SECONDS = 0.2
"""What the local server takes for an answer."""


class Unavailable(Exception):
    """Why a candidate cannot run here."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much work there is."""

    gb: float
    """Of text in the input that is made, 1e9 bytes."""
    texts: int
    """For MinHash."""
    vectors: int
    """To score; also trees to compare."""
    requests: int


Prepared = Callable[[], dict[str, float]]
"""Does the work; returns how much it was ("amount") and other figures."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way of doing a stage's work. prepare: given the folder of inputs, an empty folder and the size."""

    name: str
    ours: bool
    prepare: Callable[[Path, Path, Size], Prepared]
    environment: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """Work that candidates do. unit: of the amount. wanted: of our rate, in the best peer's, where something is."""

    name: str
    unit: str
    candidates: tuple[Candidate, ...]
    wanted: float | None = None


# ---------------------------------------------------------------- inputs


def make_stack(folder: Path, gb: float) -> None:
    """Parquet of The Stack's shape: files of installed packages, each with a line more, until there is so much text."""
    import pyarrow
    import pyarrow.parquet

    texts = [text for text in package_texts() if len(text) < 1 << 20]
    columns = [(name, pyarrow.string()) for name in ("hexsha", "content", "max_stars_repo_path", "max_stars_repo_name")]
    schema = pyarrow.schema(
        [*columns, ("max_stars_repo_licenses", pyarrow.list_(pyarrow.string())), ("max_stars_count", pyarrow.int64())]
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = number = 0
    with pyarrow.parquet.ParquetWriter(folder / "data.parquet", schema, compression="snappy") as writer:
        while written < gb * 1e9:
            rows: list[dict[str, Any]] = []
            while len(rows) < STACK_ROWS and written < gb * 1e9:
                content = f"# file {number}\n{texts[number % len(texts)]}"
                rows.append(
                    {
                        "hexsha": f"{number:040x}",
                        "content": content,
                        "max_stars_repo_path": f"src/file{number}.py",
                        "max_stars_repo_name": f"someone/project{number % 997}",
                        "max_stars_repo_licenses": ["MIT"],
                        "max_stars_count": number % 50,
                    }
                )
                number, written = number + 1, written + len(content)
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


@functools.cache
def package_texts() -> list[str]:
    """Python files of installed packages, in a fixed order."""
    import importlib.util

    roots = [importlib.util.find_spec(name) for name in PACKAGES]
    files = [path for spec in roots if spec and spec.origin for path in Path(spec.origin).parent.rglob("*.py")]
    texts = [text for path in sorted(files) if (text := path.read_text(encoding="utf-8", errors="replace"))]
    random.Random(0).shuffle(texts)
    return texts


def make_inputs(folder: Path, size: Size) -> None:
    """The Stack's parquet, and the documents that ingest makes of it, which are tokenized."""
    from data_tools import ingest

    make_stack(folder / "stack", size.gb)
    config = ingest.Config(output=folder / "documents", sources=(f"stack:{folder / 'stack'}",))
    with contextlib.redirect_stderr(io.StringIO()):
        ingest.run(config)


# ---------------------------------------------------------------- candidates


def ingesting(source: str, workers: int) -> Callable[[Path, Path, Size], Prepared]:
    """Documents of installed packages, or of the parquet file."""

    def prepare(inputs: Path, work: Path, size: Size) -> Prepared:
        from data_tools import ingest

        packages = tuple(f"pypi:{name}" for name in PACKAGES)
        sources = packages if source == "packages" else (f"stack:{inputs / 'stack'}",)
        config = ingest.Config(output=work / "documents", sources=sources, workers=workers, any_license=True)
        return lambda: {"amount": float(ingest.run(config).counters["read"])}

    return prepare


def tokenizing(workers: int) -> Callable[[Path, Path, Size], Prepared]:
    """MB of text into token shards, the reading of parquet and the writing included."""

    def prepare(inputs: Path, work: Path, size: Size) -> Prepared:
        from data_tools import tokenize

        config = tokenize.Config(inputs=[inputs / "documents"], output=work / "tokens", workers=workers)

        def run() -> dict[str, float]:
            tokenize.run(config)
            return {"amount": megabytes(inputs / "documents")}

        return run

    return prepare


def megabytes(folder: Path) -> float:
    """1e6 bytes of text in a dataset of documents."""
    from data_tools.dataset import Dataset

    dataset = Dataset(folder)
    return sum(sum(dataset.table(i, ["size"]).column("size").to_pylist()) for i in range(len(dataset.shards))) / 1e6


def fast_batch(inputs: Path, work: Path, size: Size) -> Prepared:
    """MB of text in memory into the library's own encodings, all in one call, and nothing written."""
    from data_tools.dataset import Dataset
    from phi1.tokenizer import codegen_tokenizer

    texts = Dataset(inputs / "documents").column("content")
    codegen_tokenizer().save(work / "tokenizer.json")
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(work / "tokenizer.json"))
    amount = megabytes(inputs / "documents")

    def run() -> dict[str, float]:
        tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return {"amount": amount}

    return run


def _masked(size: Size) -> list[list[str]]:
    """Tokens of functions of installed packages; every fourth stands twice, with a line more."""
    from bench.decontaminate import functions
    from data_tools.diversity import mask

    found: list[list[str]] = []
    for i, (source, _) in enumerate(functions(PACKAGES)):
        tokens = mask(source)
        found += [tokens] if i % 4 else [tokens, [*tokens, "pass"]]
        if len(found) >= size.texts:
            break
    return found[: size.texts]


def twins(inputs: Path, work: Path, size: Size) -> Prepared:
    """Near twins by `data_tools.diversity`, each candidate compared exactly."""
    from data_tools.diversity import Twins

    texts = _masked(size)

    def run() -> dict[str, float]:
        known = Twins()
        return {"amount": float(len(texts)), "twins": float(sum(known.add(text) is not None for text in texts))}

    return run


def datasketch_twins(inputs: Path, work: Path, size: Size) -> Prepared:
    """Near twins by datasketch's MinHash and LSH, with as many permutations and bands; candidates are not compared."""
    from data_tools.diversity import BAND_ROWS, BANDS, NGRAM, ngrams

    try:
        import datasketch
    except ImportError as error:
        raise Unavailable("pip install datasketch") from error
    texts = _masked(size)

    def run() -> dict[str, float]:
        index = datasketch.MinHashLSH(num_perm=BANDS * BAND_ROWS, params=(BANDS, BAND_ROWS))
        found = 0
        for number, text in enumerate(texts):
            sketch = datasketch.MinHash(num_perm=BANDS * BAND_ROWS)
            sketch.update_batch([gram.encode() for gram in set(ngrams(text, NGRAM))])
            found += bool(index.query(sketch))
            index.insert(number, sketch)
        return {"amount": float(len(texts)), "twins": float(found)}

    return run


def _forest(size: Size) -> tuple[Any, Any]:
    """A forest as the classifier's, and vectors to score."""
    import numpy as np
    from sklearn.ensemble import RandomForestClassifier

    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 384)).astype(np.float32)
    y = (x[:, :8].sum(1) > 0).astype(int)
    forest = RandomForestClassifier(TREES, min_samples_leaf=2, class_weight="balanced", random_state=0).fit(x, y)
    return forest, rng.normal(size=(size.vectors, 384)).astype(np.float32)


def scoring(inputs: Path, work: Path, size: Size) -> Prepared:
    """Embeddings on disk to the dataset of scores."""
    import skops.io

    from data_tools import classify, embed
    from data_tools.dataset import run_stage
    from data_tools.engine import HERE

    forest, vectors = _forest(size)
    skops.io.dump(forest, work / classify.FOREST)

    def rows(*_: Any) -> Iterator[dict[str, Any]]:
        return ({"hexsha": f"{i:040x}", "embedding": vector} for i, vector in enumerate(vectors))

    config = embed.Config(input=work, output=work / "embedded")
    embedded = run_stage("embed", config, work / "embedded", [], 1, rows, embed.schema(), quiet=True)

    def run() -> dict[str, float]:
        return {"amount": float(classify.scored(work / classify.FOREST, embedded, work / "scores", HERE).rows)}

    return run


def scikit_learn(inputs: Path, work: Path, size: Size) -> Prepared:
    """The same vectors, in memory, by `predict_proba`."""
    forest, vectors = _forest(size)
    return lambda: {"amount": float(len(forest.predict_proba(vectors)))}


def comparing(inputs: Path, work: Path, size: Size) -> Prepared:
    """Syntax trees against all of HumanEval's, by bench/decontaminate.py."""
    from bench import decontaminate

    trees = [tree for _, tree in decontaminate.functions(PACKAGES[:1])]
    return lambda: {"amount": float(decontaminate.speed(["humaneval"], trees, size.vectors)["trees"])}


class _Server:
    """An OpenAI-compatible server that takes ANSWER_SECONDS for an answer and knows how many it was busy with."""

    def __init__(self) -> None:
        import http.server

        self.busy = self.most = 0
        self.first = self.last = self.area = 0.0
        self._lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send({"object": "list", "data": [{"id": "bench", "object": "model"}]})

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                server.count(1)
                time.sleep(ANSWER_SECONDS)
                server.count(-1)
                message = {"role": "assistant", "content": "yes"}
                self._send(
                    {
                        "id": "x",
                        "object": "chat.completion",
                        "created": 0,
                        "model": "bench",
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                        "usage": {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11},
                    }
                )

            def _send(self, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                return

        class Threads(http.server.ThreadingHTTPServer):
            request_queue_size = 256  # all connect at once
            daemon_threads = True

        self._http = Threads(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def count(self, change: int) -> None:
        with self._lock:
            now = time.monotonic()
            self.area += self.busy * (now - (self.last or now))
            self.first, self.last = self.first or now, now
            self.busy += change
            self.most = max(self.most, self.busy)

    def figures(self) -> dict[str, float]:
        """Requests in flight, in the mean over the time from the first to the last, and at most."""
        return {"in flight": self.area / max(self.last - self.first, 1e-9), "most in flight": float(self.most)}


def asking(inputs: Path, work: Path, size: Size) -> Prepared:
    """Requests through the ledger, the server in the same process."""
    from data_tools.chat import Request
    from data_tools.llm import LLM
    from data_tools.llm_config import LLMConfig

    os.environ["OPENAI_API_KEY"] = "none"
    server = _Server()
    config = LLMConfig(base_url=server.url, model="bench", ledger=work / "llm.sqlite", concurrency=CONCURRENCY)

    def run() -> dict[str, float]:
        requests = [Request([{"role": "user", "content": "Yes?"}], 1, seed=i) for i in range(size.requests)]
        with LLM(config, work / "llm.sqlite") as llm:
            answers = sum(not isinstance(answer, Exception) for answer in llm.ask_all(requests))
        return {"amount": float(answers)} | server.figures()

    return run


def openai_alone(inputs: Path, work: Path, size: Size) -> Prepared:
    """The same requests by the openai package in as many threads, nothing kept."""
    import concurrent.futures

    import openai

    server = _Server()
    client = openai.OpenAI(base_url=server.url, api_key="none")

    def ask(seed: int) -> Any:
        messages: Any = [{"role": "user", "content": "Yes?"}]
        return client.chat.completions.create(model="bench", messages=messages, max_tokens=1, seed=seed)

    def run() -> dict[str, float]:
        with concurrent.futures.ThreadPoolExecutor(CONCURRENCY) as pool:
            answers = sum(1 for _ in pool.map(ask, range(size.requests)))
        return {"amount": float(answers)} | server.figures()

    return run


_TWO = (("RAYON_NUM_THREADS", "2"),)
_ONE = (("RAYON_NUM_THREADS", "1"),)
STAGES = (
    Stage(
        "ingest-packages", "documents", tuple(Candidate(f"ours, {n}", True, ingesting("packages", n)) for n in (1, 2))
    ),
    Stage("ingest-stack", "documents", tuple(Candidate(f"ours, {n}", True, ingesting("stack", n)) for n in (1, 2))),
    Stage(
        "tokenize",
        "MB",
        (
            Candidate("ours, 1", True, tokenizing(1), _ONE),
            Candidate("ours, 2", True, tokenizing(2)),
            Candidate("tokenizers, 1 thread", False, fast_batch, _ONE),
            Candidate("tokenizers, 2 threads", False, fast_batch, _TWO),
        ),
        0.95,
    ),
    Stage("minhash", "texts", (Candidate("ours", True, twins), Candidate("datasketch", False, datasketch_twins)), 5.0),
    Stage("score", "vectors", (Candidate("ours", True, scoring), Candidate("scikit-learn", False, scikit_learn))),
    Stage("decontaminate", "trees", (Candidate("ours", True, comparing),)),
    Stage("ask", "requests", (Candidate("ours", True, asking), Candidate("openai", False, openai_alone))),
)
