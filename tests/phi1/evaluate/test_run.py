"""The evaluate command: sampling with resume, scores with intervals, and a whole run of a tiny random model."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from phi1.errors import UserError
from phi1.evaluate import exercises, run, sandbox
from phi1.evaluate.humaneval import Problem
from phi1.evaluate.models import Model, Refused, Unserved
from phi1.evaluate.run import Config
from phi1.files import sha256_file

PROBLEMS = [
    Problem(
        f"P/{i}",
        f"def add(x):\n    # add {i}\n",
        "add",
        f"def check(c):\n    assert c(1) == {1 + i}\n    assert c(2) == {2 + i}\n",
        f"    return x + {i}\n",
        "even" if i % 2 == 0 else "odd",
    )
    for i in range(100)
]


def right_if_even(prompts: Sequence[str], seed: int) -> list[str]:
    numbers = [int(prompt.split()[-1]) for prompt in prompts]
    return [f"    return x + {n + n % 2}\n\nprint('more')" for n in numbers]


def model(generate: Any) -> Model:
    return Model("a model", "its hash", "its tokenizer's", generate)


def sample(folder: pathlib.Path, generate: Any = right_if_even, **options: Any) -> list[dict[str, Any]]:
    config = Config(checkpoint=folder, **options)
    return run.sample(PROBLEMS, model(generate), folder / "out", {"made": "here"}, config, "full")


def test_samples_are_cut_run_and_scored(tmp_path: pathlib.Path) -> None:
    rows = sample(tmp_path)
    by_id = {row["task_id"]: row for row in rows}
    assert by_id["P/0"]["completion"] == "    return x + 0\n\n"
    assert by_id["P/0"]["status"] == "passed" and by_id["P/1"]["status"] == "failed"
    facts = {
        name: by_id["P/1"][name] for name in ("answer", "program", "detail", "how", "strength", "model", "tokenizer")
    }
    assert facts == {
        "answer": "    return x + 2\n\nprint('more')",
        "program": PROBLEMS[1].prompt + "    return x + 2\n\n",
        "detail": "AssertionError in: assert c(1) == 2",
        "how": "completion",
        "strength": "full",
        "model": "its hash",
        "tokenizer": "its tokenizer's",
    }
    results = run.score(PROBLEMS, rows)
    assert [(s["group"], s["cut"], s["problems"], s["pass"]) for s in results["scores"]] == [
        ("all", "parsing", 100, 0.5),
        ("even", "parsing", 50, 1.0),
        ("odd", "parsing", 50, 0.0),
        ("all", "stop strings", 100, 0.5),
    ]
    assert results["statuses"] == {"passed": 50, "failed": 50}
    low, high = results["scores"][0]["low"], results["scores"][0]["high"]
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    text = run.table({"benchmark": "exercises", "samples": 1, "temperature": 0.0} | results)
    assert "50.0%  40.4–59.6%, 40.0–60.0%" in text and "failed 50, passed 50" in text


def test_a_run_that_was_cut_off_goes_on(tmp_path: pathlib.Path) -> None:
    calls: list[int] = []

    def stops(prompts: Sequence[str], seed: int) -> list[str]:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right_if_even(prompts, seed)

    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path, stops)
    path = tmp_path / "out" / "samples.jsonl"
    assert len(run.read_lines(path)) == run.CHUNK
    with open(path, "a") as file:
        file.write('{"task_id": "P/9", "sam')  # the disk stopped here
    rows = sample(tmp_path, stops)
    assert calls == [64, 36, 36] and len(rows) == 100
    assert run.read_lines(path) == rows
    assert sample(tmp_path, stops) == rows and len(calls) == 3


def test_what_a_server_owes_is_no_wrong_answer(tmp_path: pathlib.Path) -> None:
    """A sample without an answer is asked for again; where none comes the evaluation stops, and keeps none of them."""
    few, path = PROBLEMS[:8], tmp_path / "out" / "samples.jsonl"
    broken: list[int] = []

    def hiccups(prompts: Sequence[str], seed: int) -> list[Any]:
        numbers = [int(prompt.split()[-1]) for prompt in prompts]
        return [Unserved("500") if n in broken else f"    return x + {n}\n" for n in numbers]

    def sampled() -> list[dict[str, Any]]:
        return run.sample(few, model(hiccups), tmp_path / "out", {}, Config(checkpoint=tmp_path), "full")

    broken[:] = range(8)
    with pytest.raises(UserError, match=r"a model: no answer to any of 8 prompts \(500\).*run the same command again"):
        sampled()
    assert not path.exists()
    broken[:] = range(1, 8)
    results = run.score(few, sampled())
    assert results["statuses"] == {"no_answer": 7, "passed": 1}
    text = run.table({"benchmark": "x", "samples": 1, "temperature": 0.0} | results)
    assert "no_answer counts as not passed; the same command asks for those again" in text
    assert len(sampled()) == 8  # asked again in vain: they may be the prompts' fault
    broken[:] = []
    rows = sampled()
    assert {row["status"] for row in rows} == {"passed"} and run.read_lines(path) == rows and len(rows) == 8
    assert "no_answer" not in run.table({"benchmark": "x", "samples": 1, "temperature": 0.0} | run.score(few, rows))


def test_foreign_rows_and_rows_that_stand_twice(tmp_path: pathlib.Path) -> None:
    few, path = PROBLEMS[:4], tmp_path / "out" / "samples.jsonl"

    def sampled() -> list[dict[str, Any]]:
        return run.sample(few, model(right_if_even), tmp_path / "out", {}, Config(checkpoint=tmp_path), "full")

    rows = sampled()
    whole = path.read_text()
    with open(path, "a") as file:
        file.write(json.dumps(rows[0] | {"status": "failed"}) + "\n")
    assert run.score(few, sampled())["statuses"] == {"passed": 1, "failed": 3}  # the last of them counts
    assert len(run.read_lines(path)) == 4
    for foreign, why in (
        ("[]", "no task_id, sample, status"),
        ('{"task_id": "P/1", "completion": "    return 1"}', "no sample, status"),
        (json.dumps(rows[0] | {"sample": True}), "no sample"),
        (json.dumps(rows[0] | {"sample": 1}), "'P/0', sample 1"),
        (json.dumps(rows[0] | {"task_id": "P/99"}), "'P/99', sample 0"),
    ):
        path.write_text(whole + foreign + "\n")
        with pytest.raises(UserError, match=rf"samples\.jsonl: row 5 is none of this evaluation \({why}.*delete it"):
            sampled()


def test_one_evaluation_at_a_time_in_a_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(checkpoint=tmp_path, output=tmp_path / "out")

    def another(prompts: Sequence[str], seed: int) -> list[str]:
        with pytest.raises(UserError, match=r"out: another evaluation is running there.*--output"):
            run.run(config)
        return right_if_even(prompts, seed)

    monkeypatch.setattr(run, "load_model", lambda config: model(another))
    monkeypatch.setattr(run, "load_problems", lambda config: PROBLEMS[:2])
    run.run(config)
    run.run(config)  # the folder is free again
    assert len(run.read_lines(tmp_path / "out" / "samples.jsonl")) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written \(.*--output"):
        run.run(dataclasses.replace(config, output=tmp_path / "file"))


def test_samples_of_other_settings_are_not_mixed(tmp_path: pathlib.Path) -> None:
    sample(tmp_path)
    with pytest.raises(UserError, match="other settings"):
        run.sample(
            PROBLEMS, model(right_if_even), tmp_path / "out", {"made": "elsewhere"}, Config(checkpoint=tmp_path), "full"
        )


def test_several_samples_give_pass_at_k(tmp_path: pathlib.Path) -> None:
    def half(prompts: Sequence[str], seed: int) -> list[str]:
        numbers = [int(prompt.split()[-1]) for prompt in prompts]
        return [f"    return x + {n + (i + seed) % 2}\n" for i, n in enumerate(numbers)]

    few = PROBLEMS[:8]
    config = Config(checkpoint=tmp_path, samples=2, temperature=0.5)
    rows = run.sample(few, model(half), tmp_path / "out", {}, config, "full")
    assert len(rows) == 16 and {row["sample"] for row in rows} == {0, 1}
    scores = [
        (s["k"], s["pass"])
        for s in run.score(few, rows, (1, 2, 10))["scores"]
        if s["group"] == "all" and s["cut"] == "parsing"
    ]
    assert scores == [(1, 0.5), (2, 0.5)]


def exercise_dataset(folder: pathlib.Path, **changed: Any) -> pathlib.Path:
    rows = [
        {
            "prompt": p.prompt,
            "entry_point": p.entry_point,
            "test": p.test,
            "solution": p.solution,
            "composition": "a+b" if i else "a",
        }
        | changed
        for i, p in enumerate(PROBLEMS[:3])
    ]
    folder.mkdir()
    path = folder / "00000.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (folder / "manifest.json").write_text(json.dumps({"shards": [{"sha256": sha256_file(path)}]}))
    return folder


def test_exercises_are_read_and_checked(tmp_path: pathlib.Path) -> None:
    folder = exercise_dataset(tmp_path / "e")
    problems = exercises.load(folder)
    assert [p.group for p in problems] == ["one step", "two steps", "two steps"]
    assert dataclasses.replace(problems[1], task_id="P/1", group="odd") == PROBLEMS[1]
    assert exercises.load(exercise_dataset(tmp_path / "n", test=None))[0].test == ""
    (folder / "00000.parquet").write_bytes(b"other")
    with pytest.raises(UserError, match=r"00000\.parquet: corrupt shard"):
        exercises.load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a whole dataset"):
        exercises.load(folder)


def test_the_command_end_to_end(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real checkpoint of a tiny random model, real generation, real sandbox: the score is 0, and says so."""
    import torch

    from phi1.checkpoint import write_model
    from phi1.config import ModelConfig
    from phi1.model import Phi1
    from phi1.tokenizer import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(["def f(x):\n    return x\n" * 50], 300)
    shape = ModelConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=32,
        rotary_dim=16,
        max_positions=1024,
    )
    write_model(tmp_path / "model", Phi1(shape), tokenizer, {"step": 0})
    run.run(Config(checkpoint=tmp_path / "model", limit=3, max_new_tokens=8, device="cpu"))
    out = capsys.readouterr().out
    assert "pass@1     0.0%  0.0–56.1%" in out, out
    results = json.loads((tmp_path / "model-humaneval" / "results.json").read_text())
    assert results["scores"][0]["pass"] == 0 and results["scores"][0]["problems"] == 3
    assert results["sandbox"]["level"] == sandbox.strength().level and results["sandbox"]["system_calls"] is True
    run.run(
        Config(
            checkpoint=tmp_path / "model",
            benchmark="exercises",
            exercises=exercise_dataset(tmp_path / "e"),
            output=tmp_path / "out",
            max_new_tokens=8,
            device="cpu",
        )
    )
    assert "two steps" in capsys.readouterr().out


def test_a_weak_sandbox_is_refused_unless_told_otherwise(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weak = sandbox.Strength("weak", (), False, 0, False, ("no seccomp here",))
    monkeypatch.setattr(sandbox, "strength", lambda: weak)
    monkeypatch.setattr(run, "load_model", lambda config: model(right_if_even))
    monkeypatch.setattr(run, "load_problems", lambda config: PROBLEMS[:2])
    config = Config(checkpoint=tmp_path, output=tmp_path / "out")
    with pytest.raises(UserError, match=r"no seccomp here.*--allow-weak-sandbox"):
        run.run(config)
    assert not (tmp_path / "out").exists()
    run.run(dataclasses.replace(config, allow_weak_sandbox=True))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["sandbox"]["level"] == "weak" and results["sandbox"]["missing"] == ["no seccomp here"]


def test_rows_are_on_disk_as_they_come(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out" / "samples.jsonl"
    real = sandbox.run_each

    def watched(jobs: Any, *, workers: int) -> Any:
        for count, one in enumerate(real(jobs, workers=workers)):
            assert path.read_text().count("\n") == count
            yield one
            if count == 9:
                raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "run_each", watched)

    def plain(prompts: Sequence[str], seed: int) -> list[str]:
        return ["    return x\n" for _ in prompts]  # the same by both ways to cut: one run each

    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path, plain)
    assert path.read_text().count("\n") == 10


def test_bad_options(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="needs --exercises"):
        run.run(Config(checkpoint=tmp_path, benchmark="exercises"))
    with pytest.raises(UserError, match="--samples 5 with --temperature 0"):
        run.run(Config(checkpoint=tmp_path, samples=5))
    with pytest.raises(UserError, match="absent"):
        run.run(Config(checkpoint=tmp_path / "absent", limit=1))
    for options in ({"workers": 0}, {"k": (0,)}, {"limit": 0}, {"judge_repeats": 0}):
        with pytest.raises(UserError, match="must be at least 1"):
            run.run(Config(checkpoint=tmp_path, **options))  # type: ignore[arg-type]
    for options in ({"timeout": 0.0}, {"timeout": float("nan")}, {"answer_timeout": float("inf")}):
        with pytest.raises(UserError, match="number of seconds above 0"):
            run.run(Config(checkpoint=tmp_path, **options))  # type: ignore[arg-type]
    for k, samples in (((10,), 1), ((20, 100), 10), ((), 1)):
        with pytest.raises(UserError, match=rf"--k .*with --samples {samples}: pass@k needs k samples"):
            run.run(Config(checkpoint=tmp_path, k=k, samples=samples, temperature=0.5))
    with pytest.raises(UserError, match="name the model"):
        run.run(Config())
    with pytest.raises(UserError, match="--output is missing"):
        run.run(Config(model="gpt"))


def test_what_a_model_says_is_recorded_and_stops_nothing(tmp_path: pathlib.Path) -> None:
    """NUL, halves of characters, nothing, no answer, an endless answer, a raw U+2028, a problem without a test."""
    said: list[Any] = [
        "    return x + 0\0\n",
        "    raise ValueError('\\ud800')\n",
        "    return '\ud800'\n",
        "",
        Refused("no answer within 1 s"),
        "    return x\n" * 100_000,
        "    return x + 6  # \u2028 \x0c\n",
        "    return x + 7\n",
        "    print('\\ud83d', x)\n    return x + 8\n",
        "Sorry, I cannot.",
        "    return " + "(" * 5000 + "\n",
        "    while True: pass\n",
    ]
    problems = [*PROBLEMS[:7], dataclasses.replace(PROBLEMS[7], test=" \n"), *PROBLEMS[8:12]]
    config = Config(checkpoint=tmp_path, timeout=1.0)

    def answer(prompts: Sequence[str], seed: int) -> list[Any]:
        return said

    def refuses(prompts: Sequence[str], seed: int) -> list[Any]:
        assert prompts == [problems[4].prompt]  # what was refused is asked again
        return said[4:5]

    rows = {r["task_id"]: r for r in run.sample(problems, model(answer), tmp_path / "out", {}, config, "full")}
    assert [rows[p.task_id]["status"] for p in problems] == [
        "failed",
        "failed",
        "failed",
        "failed",
        "no_answer",
        "failed",
        "passed",
        "no_test",
        "passed",
        "failed",
        "failed",
        "timed_out",
    ]
    assert "ValueError" in rows["P/1"]["detail"] and rows["P/4"]["detail"] == "no answer within 1 s"
    assert rows["P/8"]["output"] == "\\ud83d 1\n\\ud83d 2\n" and len(rows["P/5"]["answer"]) < 100_000
    again = run.sample(problems, model(refuses), tmp_path / "out", {}, config, "full")  # all else is on disk
    assert {r["task_id"]: r for r in again} == rows
    results = run.score(problems, again)
    assert results["without_test"] == 1 and results["scores"][0]["problems"] == 11
    run.write_json(tmp_path / "out" / "results.json", results | {"text": "\ud800"})
    assert "1 problems have no test" in run.table({"benchmark": "x", "samples": 1, "temperature": 0.0} | results)


def test_a_prompt_that_is_no_text_is_recorded(tmp_path: pathlib.Path) -> None:
    problems = [dataclasses.replace(PROBLEMS[0], prompt="def add(x):\n    '\ud800'\n"), PROBLEMS[2]]
    asked: list[str] = []

    def answer(prompts: Sequence[str], seed: int) -> list[str]:
        asked.extend(prompts)
        return right_if_even(prompts, seed)

    rows = run.sample(problems, model(answer), tmp_path / "out", {}, Config(checkpoint=tmp_path), "full")
    assert asked == [PROBLEMS[2].prompt] and {r["task_id"]: r["status"] for r in rows} == {
        "P/0": "no_answer",
        "P/2": "passed",
    }


def test_lines_end_at_newlines_only(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"text": "a\u2028b\x85c\x0bd\x0ce\x1cf"}
    path.write_text(
        json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert run.read_lines(path) == [row, row]
    path.write_text("{}\nno\n")
    with pytest.raises(UserError, match="line 2 is not JSON"):
        run.read_lines(path)


def test_no_problem_with_a_test_is_no_crash() -> None:
    assert run.score([dataclasses.replace(PROBLEMS[0], test="")], [])["scores"] == []


def test_the_puzzles_are_a_benchmark(tmp_path: pathlib.Path) -> None:
    problems = run.load_problems(Config(checkpoint=tmp_path, benchmark="puzzles", limit=4))
    rows = run.sample(
        problems,
        model(lambda prompts, seed: [p.solution for p in problems]),
        tmp_path / "out",
        {},
        Config(checkpoint=tmp_path),
        "full",
    )
    assert [row["status"] for row in rows] == ["passed"] * 4
