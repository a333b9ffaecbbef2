"""Published data sets, and files at hf:// and s3://, against a local object store and hub."""

import gzip
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from object_server import ObjectServer

from data_tools import data_sets, ingest, remote
from data_tools.data_sets import DATA_SETS
from data_tools.dataset import Dataset
from phi1.errors import UserError


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[ObjectServer]:
    server = ObjectServer()
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "HF_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    from huggingface_hub import HfFileSystem

    hub = pa.fs.PyFileSystem(
        pa.fs.FSSpecHandler(HfFileSystem(endpoint=server.url, token=False, skip_instance_cache=True))
    )
    monkeypatch.setattr(remote, "_hub", lambda: hub)
    yield server
    server.close()


def table(rows: Sequence[Mapping[str, Any]], groups: int = 1) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=-(-len(rows) // groups))
    return file.getvalue()


def run(tmp_path: pathlib.Path, *sources: str, **options: Any) -> Dataset:
    return ingest.run(
        ingest.Config(output=tmp_path / options.pop("name", "documents"), sources=sources, workers=1, **options)
    )


def code(name: str) -> str:
    return f"def {name}(n):\n    return n + 1\n"


def test_every_data_set_is_read_from_the_hub(
    store: ObjectServer, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blob = {
        "path": "a/b.py",
        "repo_name": "o/r",
        "detected_licenses": ["MIT"],
        "language": "Python",
        "revision_id": "f" * 40,
    }
    rows: dict[str, list[dict[str, Any]]] = {
        "the-stack-dedup": [
            {
                "content": code("stack"),
                "max_stars_repo_path": "a.py",
                "max_stars_repo_licenses": ["MIT"],
                "lang": "Python",
            }
        ],
        "the-stack-v2": [blob | {"blob_id": "a2", "src_encoding": "UTF-8"}],
        "stack-edu": [blob | {"blob_id": "b3", "src_encoding": "ISO-8859-1"}],
        "python-edu": [{"blob_id": "c4", "path": "c.py", "repo_name": "o/r"}],
        "cosmopedia-v2": [
            {
                "prompt": "Write",
                "text": "Once there was a loop that went round.",
                "audience": "children",
                "format": "story",
            }
        ],
        "code-exercises": [{"problem": 'def f(n):\n    """Add one."""', "solution": "    return n + 1"}],
        "open-code-instruct": [
            {
                "id": "i",
                "input": "Add one to a number.",
                "output": "```python\nn += 1\n```",
                "unit_tests": "[]",
                "tests_execution_status": '["pass", "pass"]',
            },
            {
                "id": "j",
                "input": "Add two.",
                "output": "n",
                "unit_tests": "[]",
                "tests_execution_status": '["pass", "fail"]',
            },
            {
                "id": "k",
                "input": "Add three.",
                "output": "n",
                "unit_tests": "[]",
                "tests_execution_status": "pass pass",
            },
        ],
    }
    assert rows.keys() == DATA_SETS.keys()
    for name, about in DATA_SETS.items():
        owner, repository, *folder = about.place.removeprefix("hf://datasets/").split("/")
        path = "/".join([*folder, "train-0.parquet"])
        store.hub.setdefault(f"{owner}/{repository}", {})[path] = table(rows[name])
    for key, text in (
        ("a2", code("v2").encode()),
        ("b3", f"# caf\xe9\n{code('edu')}".encode("latin-1")),
        ("c4", code("python_edu").encode()),
    ):
        store.objects[f"softwareheritage/content/{key}"] = gzip.compress(text)
    made = run(tmp_path, *DATA_SETS)
    read = {row["source"].partition(":")[0]: row for row in made.read()}
    assert {name: row["content"] for name, row in read.items()} == {
        "the-stack-dedup": code("stack"),
        "the-stack-v2": code("v2"),
        "stack-edu": f"# café\n{code('edu')}",
        "python-edu": code("python_edu"),
        "cosmopedia-v2": "Once there was a loop that went round.",
        "code-exercises": 'def f(n):\n    """Add one."""\n    return n + 1\n',
        "open-code-instruct": "Add one to a number.\n\n```python\nn += 1\n```\n",
    }
    assert read["stack-edu"]["origin_hexsha"] == "b3" and read["stack-edu"]["max_stars_repo_licenses"] == ["MIT"]
    assert read["stack-edu"]["url"] == f"https://github.com/o/r/blob/{'f' * 40}/a/b.py"
    assert read["cosmopedia-v2"]["max_stars_repo_name"] == "story, children" and read["cosmopedia-v2"]["lang"] == "Text"
    assert read["code-exercises"]["max_stars_repo_licenses"] == ["CC-BY-NC-SA-4.0"]
    assert (
        "warning: --sources code-exercises: its licence, CC BY-NC-SA 4.0, forbids commercial" in capsys.readouterr().err
    )
    assert made.counters["dropped_tests_failed"] == 1
    assert [failure["reason"].split(" (")[0] for failure in made.failures()] == ["tests_execution_status is not JSON"]


def test_blobs_that_cannot_be_read_are_failures_of_their_rows(
    store: ObjectServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_sets, "_LARGEST", 4000)
    good = gzip.compress(code("good").encode())
    blobs = {
        "good": good,
        "notgzip": b"plain",
        "cut": good[:-9],
        "latin": gzip.compress(b"# \xff\n"),
        "bomb": gzip.compress(b"x" * 5000),
    }
    store.objects = {f"softwareheritage/content/{key}": data for key, data in blobs.items()}
    encodings = {"latin": "ascii", "good": "utf-8", "odd": "no-such-code"}
    keys = [*blobs, "absent", "../etc", "", "odd"]
    store.objects["softwareheritage/content/odd"] = good
    path = tmp_path / "edu.parquet"
    path.write_bytes(table([{"blob_id": key, "path": f"{key}.py", "src_encoding": encodings.get(key)} for key in keys]))
    made = run(tmp_path, f"stack-edu:{path}", max_failed=1.0)
    assert [row["content"] for row in made.read()] == [code("good")]
    reasons = {failure["key"].rpartition("/")[2]: failure["reason"] for failure in made.failures()}
    told = {
        "notgzip.py": "is not gzip",
        "cut.py": "is cut",
        "latin.py": "not UTF-8",
        "bomb.py": "inflates to more than 4,000 bytes",
        "absent.py": "is not in Software Heritage",
        "etc.py": "blob_id is '../etc'",
        ".py": "blob_id is ''",
        "odd.py": "not no-such-code",
    }
    assert reasons.keys() == told.keys() and all(told[key] in reason for key, reason in reasons.items()), reasons


def test_blobs_stand_in_the_order_of_their_rows(store: ObjectServer, tmp_path: pathlib.Path) -> None:
    names = [f"f{i}" for i in range(300)]
    store.objects = {f"softwareheritage/content/{name}": gzip.compress(code(name).encode()) for name in names}
    (tmp_path / "t.parquet").write_bytes(table([{"blob_id": name, "path": "x.py"} for name in names], groups=2))
    made = run(tmp_path, f"python-edu:{tmp_path / 't.parquet'}")
    assert [row["origin_hexsha"] for row in made.read()] == names
    asked = sum(store.asked.values())
    assert run(tmp_path, f"python-edu:{tmp_path / 't.parquet'}").hash == made.hash
    assert sum(store.asked.values()) == asked  # what is whole is not fetched again


@pytest.mark.parametrize("scheme", ["s3://bucket", "hf://datasets/owner/name"])
def test_tables_and_lines_at_a_url(scheme: str, store: ObjectServer, tmp_path: pathlib.Path) -> None:
    lines = "".join(json.dumps({"text": code(f"l{i}"), "path": "l.py"}) + "\n" for i in range(3)).encode()
    files = {
        "data/a.parquet": table([{"body": code(f"a{i}")} for i in range(6)], groups=3),
        "data/deep/b.parquet": table([{"body": code("b")}]),
        "more/c.jsonl.zst": pa.compress(lines, codec="zstd", asbytes=True),
        "more/readme.txt": b"not read",
    }
    store.objects = {f"bucket/{name}": data for name, data in files.items()}
    store.hub["owner/name"] = files
    made = run(tmp_path, f"{scheme}/data?content=body", f"{scheme}/more")
    texts = [row["content"] for row in made.read()]
    assert texts == [code(name) for name in ("a0", "a1", "a2", "a3", "a4", "a5", "b", "l0", "l1", "l2")]
    assert [row["source"].partition(":")[2] for row in made.read()][5:8] == [
        "a.parquet",
        "deep/b.parquet",
        "c.jsonl.zst",
    ]
    pattern = run(tmp_path, f"parquet:{scheme}/data/*.parquet?content=body", name="pattern")
    assert pattern.rows == 7  # fnmatch's * goes into folders, as an object store has none
    with pytest.raises(UserError, match="shard 0 was made when"):  # what lies there is another file now
        files["data/a.parquet"] = store.objects["bucket/data/a.parquet"] = table(
            [{"body": code(f"new{i}")} for i in range(6)], groups=3
        )
        run(tmp_path, f"parquet:{scheme}/data/*.parquet?content=body", name="pattern")


@pytest.mark.parametrize(
    ("source", "refused", "told"),
    [
        ("s3://bucket/x.parquet", (403, "AccessDenied"), "set AWS_ACCESS_KEY_ID"),
        ("s3://bucket/x.parquet", (404, "NoSuchKey"), "check the path"),
        ("s3://bucket/folder", None, "no .parquet or .jsonl or .jsonl.zst file there|check the path"),
        ("hf://datasets/o/n/x.parquet", (403, "GatedRepo"), "accept the data set's terms"),
        ("hf://datasets/o/n/x.parquet", (401, "RepoNotFound"), "check owner and name"),
        ("hf://datasets/o/n", (429, ""), "rate limit"),
        ("hf://datasets/o/n/data", None, "check"),
        ("stack-edu", (403, "GatedRepo"), "HF_TOKEN"),
    ],
)
def test_what_cannot_be_read_says_what_would_work(
    source: str, refused: Any, told: str, store: ObjectServer, tmp_path: pathlib.Path
) -> None:
    store.refuse = lambda path: refused
    with pytest.raises(UserError, match=told) as caught:
        run(tmp_path, source)
    assert "\n" not in str(caught.value) and (source in str(caught.value) or source == "stack-edu")


def test_a_store_that_is_busy_stops_the_run_which_then_goes_on(store: ObjectServer, tmp_path: pathlib.Path) -> None:
    store.objects["softwareheritage/content/a"] = gzip.compress(code("a").encode())
    (tmp_path / "t.parquet").write_bytes(table([{"blob_id": "a", "path": "x.py"}]))
    store.refuse = lambda path: (403, "AccessDenied")
    with pytest.raises(UserError, match="softwareheritage/content/a: cannot be read"):
        run(tmp_path, f"python-edu:{tmp_path / 't.parquet'}")
    store.refuse = lambda path: None
    assert run(tmp_path, f"python-edu:{tmp_path / 't.parquet'}").rows == 1


def test_credentials_are_used_where_there_are_some(
    store: ObjectServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.objects = {"bucket/x.parquet": table([{"content": code("x")}])}
    run(tmp_path, "s3://bucket/x.parquet", name="anybody")
    assert store.signed == 0
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    run(tmp_path, "s3://bucket/x.parquet", name="somebody")
    assert store.signed > 0


def test_a_file_that_is_not_the_data_sets_is_told(store: ObjectServer, tmp_path: pathlib.Path) -> None:
    (tmp_path / "t.parquet").write_bytes(table([{"problem": "x", "answer": "y"}]))
    with pytest.raises(UserError, match="has no column `solution`, but problem, answer"):
        run(tmp_path, f"code-exercises:{tmp_path / 't.parquet'}")
    with pytest.raises(UserError, match=r"--sources stack_edu: not a source.*stack-edu"):
        run(tmp_path, "stack_edu")


def test_what_the_hubs_http_client_raises_is_explained() -> None:
    """It is no OSError, and the client's name has changed."""
    lost = type("ConnectError", (Exception,), {"__module__": "httpx2._exceptions"})
    message = r"^hf://datasets/a/b: cannot be read \(ConnectError: Name or service not known\)"
    with pytest.raises(UserError, match=message), remote.explained("hf://datasets/a/b"):
        raise lost("Name or service not known")
    with pytest.raises(AssertionError), remote.explained("hf://datasets/a/b"):
        raise AssertionError("a fault of ours")
