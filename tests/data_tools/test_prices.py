"""Prices: the file, what options say, and what a run tells of its cost."""

import pathlib

import pytest
from asking import client, request
from fake_openai import FakeServer, completion

from data_tools.llm_config import LLMConfig, priced
from data_tools.prices import PRICES, price_of
from phi1 import progress
from phi1.errors import UserError

OPENAI = "https://api.openai.com/v1"


def test_models_their_dated_versions_and_what_is_not_known() -> None:
    price = price_of(OPENAI, "gpt-4o-mini")
    assert price.usd_per_token == pytest.approx((0.15e-6, 0.6e-6)) and price.batch == 0.5
    assert price_of(OPENAI, "gpt-4o-mini-2024-07-18") == price
    assert price_of(OPENAI, "gpt-4o-2024-08-06") == price_of(OPENAI, "gpt-4o") != price
    assert price_of(OPENAI, "gpt-4o-audio").usd_per_token is None
    elsewhere = price_of("http://127.0.0.1:8000/v1", "gpt-4o")
    assert elsewhere.usd_per_token is None and elsewhere.batch == 1.0  # what is not known is counted high


def test_options_go_before_the_file() -> None:
    def of(**options: float) -> tuple[float, float] | None:
        return priced(LLMConfig(base_url=OPENAI, model="gpt-4o", **options), OPENAI, "gpt-4o").usd_per_token

    assert of() == of(usd_per_million_input=2.5) == pytest.approx((2.5e-6, 10e-6))
    assert of(usd_per_million_input=1.0, usd_per_million_output=0.0) == pytest.approx((1e-6, 0.0))
    for options in ({"budget_usd": 1.0}, {"usd_per_million_input": 1.0}):
        with pytest.raises(UserError, match=r"no price of other at .*--usd-per-million-input"):
            priced(LLMConfig(base_url=OPENAI, model="other", **options), OPENAI, "other")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no = [toml", "cannot be read"),
        ('["S"]\nmodels = 3', "must have `models`"),
        ('["S"]\nbatch = 2', "must be a share"),
        ('["S".models]\nm = 3', "m must be .prompt, generated."),
        ('["S".models]\nm = [1, -1]', "m must be .prompt, generated."),
    ],
)
def test_a_file_that_holds_no_prices_is_told(text: str, told: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        price_of("S", "m", path)
    with pytest.raises(UserError, match=f"{PRICES} is one"):
        price_of("S", "m", tmp_path / "absent.toml")


def test_a_run_says_what_it_has_cost_and_what_it_will(
    server: FakeServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(progress._SECONDS, "log", 0.0)
    server.script = lambda body, index: completion("x", prompt=900, generated=100)
    options = {"usd_per_million_input": 1000.0, "usd_per_million_output": 1000.0, "concurrency": 1}
    requests = [request(str(i)) for i in range(4)]
    with client(server, tmp_path, **options) as llm:
        llm.ask(requests[0])  # a dollar
    with client(server, tmp_path, **options) as llm:
        line = progress.Progress("ask", 4, "requests")
        for answer in llm.ask_all(requests, progress=line):
            assert answer.usd == pytest.approx(1.0)
        line.close()
        assert llm.used["usd_billionths"] == 4_000_000_000
    lines = [text.split("  ")[-1] for text in capsys.readouterr().err.splitlines()]
    assert "3,000 tokens, $3.00" in lines and any("about $3.00 in all" in text for text in lines)
    assert not any("$4" in text for text in lines)  # what the ledger had is not paid again, and not projected
