import gzip
import json
import pathlib

import pytest

from phi1.errors import UserError
from phi1.evaluate import humaneval
from phi1.evaluate.sandbox import run_many

PROBLEMS = humaneval.load()


def test_all_164_canonical_solutions_pass() -> None:
    assert len(PROBLEMS) == 164
    results = run_many([problem.job(problem.solution, 10.0) for problem in PROBLEMS])
    failures = {p.task_id: r for p, r in zip(PROBLEMS, results, strict=True) if r.status != "passed"}
    assert failures == {}


def test_no_empty_body_passes() -> None:
    results = run_many([problem.job("    pass\n", 10.0) for problem in PROBLEMS])
    assert {result.status for result in results} == {"failed"}


def test_prompts_are_not_stripped() -> None:
    for problem in PROBLEMS:
        assert problem.prompt.endswith("\n")
        assert problem.job("    return 1\n", 1.0).source == problem.prompt + "    return 1\n"


@pytest.mark.parametrize("number", [10, 32, 38, 50])
def test_helper_functions_in_the_prompt_are_kept(number: int) -> None:
    problem = PROBLEMS[number]
    assert problem.prompt.count("def ") == 2
    helper = problem.prompt.split("def ")[1].split("(")[0]
    assert helper != problem.entry_point and f"def {helper}(" in problem.job("", 1.0).source


def test_reads_a_file_and_refuses_what_is_none(tmp_path: pathlib.Path) -> None:
    row = {"task_id": "X/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(c):\n    assert c() == 1\n"}
    plain, packed = tmp_path / "p.jsonl", tmp_path / "p.jsonl.gz"
    plain.write_text(json.dumps(row) + "\n\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert humaneval.load(plain) == humaneval.load(packed) and humaneval.load(plain)[0].task_id == "X/0"
    for name, data in (
        ("a.jsonl", b"not json"),
        ("b.jsonl", b'{"task_id": "X"}'),
        ("c.jsonl", b"\xff\xfe"),
        ("d.jsonl", b""),
        ("e.jsonl.gz", b"not gzip"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            humaneval.load(tmp_path / name)
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        humaneval.load(tmp_path / "absent.jsonl")
