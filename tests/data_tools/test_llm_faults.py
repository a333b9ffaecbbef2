"""Whatever the server does, and wherever the client is killed: nothing is paid twice, the budget is not passed."""

import contextlib
import json
import pathlib
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from typing import Any

import pytest
from asking import client, error, request
from fake_openai import FakeServer, completion

from data_tools import llm as llm_module
from data_tools.chat import Answer
from data_tools.ledger import Ledger
from phi1.errors import UserError

PRICES = {"usd_per_million_input": 1000.0, "usd_per_million_output": 1000.0}


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "_MAX_BACKOFF", 0.05)


class Faulty:
    """A script that answers in a random way, and keeps the books of what it may bill and of what it has answered."""

    def __init__(self, seed: int, ledger: pathlib.Path) -> None:
        self.random, self.ledger = random.Random(seed), ledger
        self.billed = 0
        self.paid_twice: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, body: dict[str, Any], index: int) -> Any:
        with self.lock:
            self.look(body)
            kind = self.random.choice(
                ["answer"] * 6
                + ["429", "500", "504", "html", "cut", "empty", "no usage", "null", "403", "reset", "odd"]
            )
            # As much as any tokenizer and template can make of it: what the ledger takes for the bound.
            prompt, generated = len(json.dumps(body, sort_keys=True)) + 64, body["max_tokens"]
            self.billed += prompt + generated if kind not in ("429", "500", "403") else 0
        text = completion("yes", prompt=prompt, generated=generated)
        if kind in ("429", "500", "504", "403"):
            return error(int(kind), kind, {"Retry-After": "0.01"} if kind == "429" else {})
        if kind == "reset":
            return 200, {}, lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
        bodies = {
            "answer": text[2],
            "html": "<html>busy</html>",
            "cut": json.dumps(text[2])[:70],
            "empty": {"choices": []},
            "no usage": text[2] | {"usage": None},
            "null": text[2] | {"choices": [{"message": None}]},
            "odd": text[2] | {"usage": {"prompt_tokens": "many"}},
        }
        return 200, {}, bodies[kind]

    def look(self, body: dict[str, Any]) -> None:
        """What stands in the ledger as answered must not be asked again."""
        with contextlib.closing(sqlite3.connect(self.ledger)) as database:
            for (asked,) in database.execute("SELECT request FROM calls WHERE state = 'done'"):
                if (
                    json.loads(asked)["messages"] == body["messages"]
                    and "harmless" not in asked
                    and "word yes" not in asked
                ):
                    self.paid_twice.append(asked)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_server_does_the_budget_holds_and_nothing_is_paid_twice(
    seed: int, server: FakeServer, tmp_path: pathlib.Path
) -> None:
    faulty = server.script = Faulty(seed, tmp_path / "llm.sqlite")
    requests = [request(f"{seed}/{i}") for i in range(25)]
    budget, answers = 3000, []
    while len(answers) < 25:  # each run goes on after what stopped the one before it, with a higher budget
        options = {"budget_usd": budget / 1000, "attempts": 4, "max_failed": 1.0}
        try:
            with client(server, tmp_path, **options, **PRICES) as llm:
                answers = list(llm.ask_all(requests))
        except UserError as caught:
            assert "to go on" in str(caught)
        spent = spent_of(tmp_path / "llm.sqlite")
        assert faulty.billed <= spent <= budget
        budget = spent + 2000
    assert sum(isinstance(answer, Answer) for answer in answers) > 12
    assert not faulty.paid_twice


def test_killed_at_any_request_the_books_still_hold(server: FakeServer, tmp_path: pathlib.Path) -> None:
    faulty = Faulty(0, tmp_path / "llm.sqlite")
    budget = 60_000
    program = (
        "import pathlib, sys\nfrom data_tools import llm\nllm._MAX_BACKOFF = 0.05\n"
        f"config = llm.LLMConfig(base_url={server.base_url!r}, model='fake-1', attempts=4, max_failed=1.0, "
        f"budget_usd={budget / 1000}, **{PRICES})\n"
        f"with llm.LLM(config, pathlib.Path({str(tmp_path / 'llm.sqlite')!r})) as client:\n"
        "    requests = [llm.Request([{'role': 'user', 'content': f'k{i}'}], 5) for i in range(60)]\n"
        "    print(sum(isinstance(answer, llm.Answer) for answer in client.ask_all(requests)))\n"
    )
    root = pathlib.Path(llm_module.__file__).parent.parent
    kill_after = [3, 11, 18]  # requests of this process; then the last one is let live
    process: subprocess.Popen[str] | None = None
    seen = 0

    def script(body: dict[str, Any], index: int) -> Any:
        reply = faulty(body, index)
        nonlocal seen
        with faulty.lock:
            seen += 1
            if kill_after and seen == kill_after[0] and process is not None:
                process.kill()
        return reply

    server.script, server.hung_up_expected = script, True
    for _ in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
        )
        out, said = process.communicate()
        assert faulty.billed <= spent_of(tmp_path / "llm.sqlite") <= budget
        if process.returncode == -signal.SIGKILL:
            kill_after.pop(0)
        elif process.returncode == 0:
            break
        else:
            assert "to go on" in said, said
        with faulty.lock:
            seen = 0
    assert not kill_after and int(out) > 30
    assert not faulty.paid_twice


def spent_of(path: pathlib.Path) -> float:
    """What a ledger has counted, in thousandths of a dollar: tokens, at PRICES."""
    ledger = Ledger(path)
    tokens, usd = ledger.spent()
    ledger.close()
    assert tokens == pytest.approx(1000 * usd)
    return tokens
