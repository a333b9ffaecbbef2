"""Models behind a server and in a Hugging Face folder, through the whole command; servers that lie, refuse, drip or are
silent.
"""

import json
import pathlib
import threading
from typing import Any

import pytest
from served import Server

from phi1.errors import UserError
from phi1.evaluate import models, run
from phi1.evaluate.models import Refused, Sampling
from phi1.evaluate.run import Config

SAMPLING = Sampling(max_new_tokens=64)
PUZZLES = run.load_problems(Config(checkpoint=pathlib.Path(), benchmark="puzzles", limit=5))
SOLUTIONS = {problem.prompt: problem.solution for problem in PUZZLES}


def evaluated(server: Server, folder: pathlib.Path, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    run.run(Config(model_url=server.url, model="fake", output=folder, benchmark="puzzles", limit=5, **options))
    return json.loads((folder / "results.json").read_text()), run.read_lines(folder / "samples.jsonl")


def test_a_completion_server_end_to_end(server: Server, tmp_path: pathlib.Path) -> None:
    server.reply = lambda request: SOLUTIONS[request["prompt"]]
    results, rows = evaluated(server, tmp_path)
    assert results["scores"][0]["pass"] == 1 and {row["how"] for row in rows} == {"completion"}
    request = server.requests[0]
    assert request["path"].endswith("/v1/completions") and request["temperature"] == 0 and request["max_tokens"] == 256
    assert results["checkpoint_folder"] == f"{server.url} fake (completion)" and len(results["checkpoint"]) == 64


def test_a_chat_server_end_to_end_with_a_judge(
    server: Server, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(request: dict[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        problem = next(p for p in PUZZLES if p.prompt.strip() in text)
        if "response_format" in request:  # the judge: right solutions are long
            return json.dumps({"critique": "Hm.", "grade": 2 if "return None" in text else 9})
        assert text.startswith("Complete this Python function.")
        wrong = problem.task_id == "puzzle/3"
        body = "    return None\n" if wrong else problem.solution
        return f"Sure! Here it is:\n\n```python\n{problem.prompt}{body}```\n\nIt follows the text."

    server.reply = reply
    results, rows = evaluated(server, tmp_path, chat=True, judge_model="fake", judge_url=server.url, judge_repeats=2)
    assert results["scores"][0]["pass"] == 0.8 and {row["how"] for row in rows} == {"fence"}
    judge = results["judge"]
    assert judge["grade_percent"] == pytest.approx(76) and judge["canaries"] == 5 and judge["canaries_believed"] == 0
    assert judge["with_tests"] == {"passed": 4, "failed": 1, "correlation": pytest.approx(1), "auc": 1}
    assert judge["deviation_between_repeats"] == 0
    assert "correlation with the tests 1.00, AUC 1.00 (4 pass, 1 fail)" in capsys.readouterr().out


def test_a_judge_that_fails_costs_neither_the_score_nor_the_grades_that_came(
    server: Server, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    limit = 7

    def reply(request: dict[str, Any]) -> Any:
        if "prompt" in request:
            return SOLUTIONS[request["prompt"]]
        if len(asked) == limit:
            return 401, "key expired"
        asked.append(request["messages"][1]["content"])
        return json.dumps({"critique": "Fine.", "grade": 9})

    server.reply = reply
    judged = {"judge_model": "fake", "judge_url": server.url, "workers": 1}
    with pytest.raises(UserError, match="OPENAI_API_KEY is refused"):
        evaluated(server, tmp_path, **judged)
    assert "pass@1   100.0%" in capsys.readouterr().out
    path = tmp_path / "grades.jsonl"
    assert len(run.read_lines(path)) == 7
    path.write_text(path.read_text() + '{"asked": "cut')
    limit = 99
    results, _ = evaluated(server, tmp_path, **judged)
    assert results["judge"]["graded"] == 5 and results["judge"]["canaries"] == 5 and len(asked) == 10
    evaluated(server, tmp_path, **judged)
    assert len(asked) == 10
    evaluated(server, tmp_path, **judged | {"judge_model": "another"})
    assert len(asked) == 20
    for row in ("[]", "{}", json.dumps(run.read_lines(path)[0] | {"grade": 11})):
        path.write_text(row + "\n")
        with pytest.raises(UserError, match=r"grades\.jsonl: row 1 is no grade .*delete it"):
            evaluated(server, tmp_path, **judged)


def test_samples_at_a_temperature_have_seeds_of_their_own(server: Server, tmp_path: pathlib.Path) -> None:
    server.reply = lambda request: SOLUTIONS[request["prompt"]] if request["seed"] % 2 else "    return None\n"
    results, rows = evaluated(server, tmp_path, samples=4, temperature=0.8, k=(1, 2))
    assert len({request["seed"] for request in server.requests}) == len(rows) == 20
    assert {s["k"] for s in results["scores"]} == {1, 2}


def test_requests_that_fail_alone_are_recorded(server: Server, tmp_path: pathlib.Path) -> None:
    names = [problem.prompt for problem in PUZZLES]

    def reply(request: dict[str, Any]) -> Any:
        return {0: (400, "too long"), 1: b"<html>", 2: None, 3: b'{"choices": []}', 4: "\ud800"}[
            names.index(request["prompt"])
        ]

    server.reply = reply
    _, rows = evaluated(server, tmp_path)
    by_id = {row["task_id"]: row for row in rows}
    assert [by_id[f"puzzle/{i}"]["status"] for i in range(5)] == [
        "no_answer",
        "no_answer",
        "failed",
        "no_answer",
        "failed",
    ]
    assert "400" in by_id["puzzle/0"]["detail"] and "no choice" in by_id["puzzle/3"]["detail"]


def test_a_busy_server_is_waited_for(server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads its model while more requests fail than the client itself repeats."""
    monkeypatch.setattr(models, "_WAITS", (0.05,))
    server.reply = lambda request: (503, "Loading") if len(server.requests) < 20 else SOLUTIONS[request["prompt"]]
    results, rows = evaluated(server, tmp_path)
    assert results["scores"][0]["pass"] == 1 and len(rows) == 5
    server.reply = lambda request: (429, "slow down")
    model = models.load_server(server.url, "fake", SAMPLING, chat=False, workers=1, timeout=9)
    with pytest.raises(UserError, match=r"busy for [2-9] s \(RateLimitError: .*run the same command again later"):
        model.complete(["x"], 0)


def test_a_server_of_another_protocol_is_no_score_of_0(server: Server, tmp_path: pathlib.Path) -> None:
    for said in (b"<html><body>login</body></html>", b'{"choices": []}', (500, "no")):
        server.reply = lambda request, said=said: said  # type: ignore[misc]
        with pytest.raises(UserError, match=r"no answer to any of 5 prompts.*--model-url"):
            evaluated(server, tmp_path)
        assert not (tmp_path / "samples.jsonl").exists() and not (tmp_path / "results.json").exists()


def test_a_server_that_never_answers(server: Server) -> None:
    wait = threading.Event()
    server.reply = lambda request: "x" if wait.wait(20) else "y"
    model = models.load_server(server.url, "fake", SAMPLING, chat=False, workers=1, timeout=0.3)
    (answer,) = model.complete(["def f():\n"], 0)
    wait.set()
    assert isinstance(answer, Refused) and "no answer within 0.3 s" in str(answer)


def test_servers_that_nothing_can_be_asked_of(server: Server) -> None:
    for status, message in ((401, "OPENAI_API_KEY is refused"), (404, r"refuses model 'fake' \(404")):
        server.reply = lambda request, status=status: (status, "no")  # type: ignore[misc]
        with pytest.raises(UserError, match=message):
            models.load_server(server.url, "fake", SAMPLING, chat=True, workers=1, timeout=5).complete(["x"], 0)
    url = server.url.replace(str(server.port), "9")
    with pytest.raises(UserError, match=r"no server answers there.*--model-url"):
        models.load_server(url, "fake", SAMPLING, chat=True, workers=1, timeout=30).complete(["x"], 0)


def test_a_server_that_knows_the_limit_by_its_new_name(server: Server) -> None:
    server.reply = lambda request: (400, "use max_completion_tokens") if "max_tokens" in request else "ok"
    model = models.load_server(server.url, "fake", SAMPLING, chat=True, workers=1, timeout=5)
    assert model.complete(["x", "y"], 0) == ["ok", "ok"]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A GPT-2 of another family, random, with a tokenizer."""
    import torch
    import transformers

    from phi1.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("hf") / "model"
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=320, n_positions=128, n_embd=32, n_layer=1, n_head=2, eos_token_id=0, bos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    train_tokenizer(["def f(x):\n    return x\n" * 50], 320).save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return folder


def test_any_hugging_face_folder(hugging_face: pathlib.Path, tmp_path: pathlib.Path) -> None:
    import torch

    model = models.load_folder(hugging_face, Sampling(max_new_tokens=8, batch_size=2), "cpu")
    prompts = ["def f(x):\n", "x" * 2000, "def longer_name(x, y):\n    return ", "a"]
    answers = model.complete(prompts, 0)
    assert isinstance(answers[1], Refused) and "leave no room" in str(answers[1])
    assert [isinstance(answer, str) for answer in answers] == [True, False, True, True]
    # Batched on the left of padding, each is what it is alone.
    assert [model.complete([prompt], 0)[0] for prompt in (prompts[0], prompts[2], prompts[3])] == [
        answers[0],
        answers[2],
        answers[3],
    ]
    drawn = models.load_folder(hugging_face, Sampling(max_new_tokens=8, temperature=1.0), "cpu")
    assert drawn.complete(prompts[:1], 1) == drawn.complete(prompts[:1], 1) != drawn.complete(prompts[:1], 2)
    assert len(model.hash) == len(model.tokenizer) == 64 and torch.get_num_threads() >= 1
    run.run(
        Config(
            checkpoint=hugging_face,
            output=tmp_path / "out",
            benchmark="puzzles",
            limit=2,
            max_new_tokens=4,
            device="cpu",
        )
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["scores"][0]["pass"] == 0 and results["checkpoint"] == model.hash


def test_a_folder_that_holds_no_model(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="transformers cannot load it"):
        models.load_folder(tmp_path, SAMPLING, "cpu")
