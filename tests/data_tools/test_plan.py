"""The plan for phi-1's data: the paces of timed stages, by hand; a run's own sizes give what it took; the funnel."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from data_tools import decontaminate, ingest, plan, synthesize, timing, tokenize
from data_tools.dataset import Counted, Dataset, Failure, Produced, run_stage
from data_tools.plan import BYTES_PER_TOKEN, Config
from phi1.cli import main
from phi1.errors import UserError

DOCUMENTS, LENGTH = 12, 5000


def took(folder: pathlib.Path, seconds: Sequence[float], wall: float, workers: int = 1) -> None:
    """As if the shards had taken so many seconds each, and the run `wall`."""
    shards = [{"shard": i, "rows": 1, "seconds": each, "cpu_seconds": each} for i, each in enumerate(seconds)]
    runs = [{"run": len(shards), "seconds": wall, "workers": workers, "engine": "local", "cores": 2}]
    (folder / timing.FILE).write_text("".join(json.dumps(line) + "\n" for line in [*shards, *runs]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run: ingested code, half of it kept by a stage, that tokenized; a checkpoint's manifest, which is no
    dataset's.
    """
    folder = tmp_path_factory.mktemp("run")

    def documents(_: Any, __: Any, shard: int) -> Iterator[Produced]:
        for i in range(DOCUMENTS // 2):
            yield {"hexsha": f"{shard}-{i}", "content": f"{shard}{i}".ljust(LENGTH, "x"), "source": "test"}

    def half(_: Any, inputs: Sequence[Dataset], shard: int) -> Iterator[Produced]:
        for i, row in enumerate(inputs[0].read(shards=[shard])):
            yield row if i % 2 else Failure(row["hexsha"], "ngram: none")
        yield Counted({"removed_ngram": 3})

    config = ingest.Config(output=folder / "code")
    for place in ("code/keys", "code"):
        stage = "ingest" if place == "code" else "ingest-keys"
        run_stage(stage, config, folder / place, [], 2, documents, ingest.schema(), quiet=True)
    code = Dataset(folder / "code")
    cleaning = decontaminate.Config(input=folder / "code", output=folder / "clean")
    run_stage("decontaminate", cleaning, folder / "clean", [code], 2, half, code.schema, quiet=True)
    tokenize.run(tokenize.Config(inputs=[folder / "clean"], output=folder / "tokens"))
    took(folder / "code" / "keys", [1.0, 1.0], 2.5)
    took(folder / "code", [2.0, 2.0], 4.0)
    took(folder / "clean", [3.0, 3.0], 5.0, workers=2)
    took(folder / "tokens", [0.5, 0.5], 1.5)
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "manifest.json").write_text('{"step": 3}')
    return folder


def cells(lines: Sequence[str], stage: str, kind: str) -> list[str]:
    (line,) = [line for line in lines if line.split()[:2] == [stage, kind]]
    return line.split()


def test_hours_are_the_measured_pace_times_the_target(made: pathlib.Path) -> None:
    config = Config(run=made, workers=4, corpus_tokens=1e9, filtered_tokens=1e9, textbook_tokens=1e7)
    lines = plan.describe(config, plan.measured(made))
    ingested = 6.0 / (DOCUMENTS * LENGTH) * 1e9 * BYTES_PER_TOKEN / 3600  # both passes
    cleaned = 6.0 / (DOCUMENTS * LENGTH) * 1e9 * BYTES_PER_TOKEN / 3600
    tokenized = 1.0 / (DOCUMENTS // 2 * LENGTH) * 1.01e9 * BYTES_PER_TOKEN / 3600
    for stage, hours in (("ingest", ingested), ("decontaminate", cleaned), ("tokenize", tokenized)):
        told = cells(lines, stage, "code")
        # Printed with one digit; parquet has bytes beside the text.
        assert float(told[3].replace(",", "")) == pytest.approx(hours, rel=0.02, abs=0.05)
        assert float(told[4].replace(",", "")) == pytest.approx(hours / 4, rel=0.02, abs=0.05)


def test_what_was_not_run_is_not_guessed(made: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = plan.describe(Config(run=made), plan.measured(made))
    assert cells(lines, "embed", "code")[3:5] == ["?", "?"] and "not run in" in lines[3]
    assert "6 stages were not run" in capsys.readouterr().err


def test_money_is_requests_times_price(made: pathlib.Path) -> None:
    prices = made / "prices.toml"
    prices.write_text('["https://api.openai.com/v1"]\nbatch = 0.25\nmodels = { writer = [1, 2], "gpt-4" = [9, 9] }\n')
    config = Config(
        run=made,
        textbook_tokens=1e9,
        textbook_length=500,
        prompt_length=100,
        kept=0.5,
        model="writer",
        prices=prices,
        requests_per_second=100,
    )
    for batch, share in ((False, 1), (True, 0.25)):
        lines = plan.describe(dataclasses.replace(config, batch=batch), plan.measured(made))
        line = next(line for line in lines if re.match(r"ask a model +textbooks", line))
        tokens, hours, usd = (float(cell.replace(",", "")) for cell in line.split()[4:7])
        assert (tokens, hours, usd) == (
            4e6 * 600,
            pytest.approx(4e6 / 100 / 3600, abs=0.05),
            share * 4e6 * (100 * 1 + 500 * 2) / 1e6,
        )
    with pytest.raises(UserError, match="has no price of nobody at https://"):
        plan.describe(dataclasses.replace(config, model="nobody"), plan.measured(made))


def test_own_sizes_give_what_the_run_took(made: pathlib.Path) -> None:
    lines = plan.own(plan.measured(made))
    for name, seconds in (("code", 6.5), ("clean", 5.0), ("tokens", 1.5)):
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert [float(word) for word in re.findall(r"([\d.]+) s", line)] == [seconds, seconds]


def test_the_pace_is_over_all_datasets_of_a_kind(made: pathlib.Path) -> None:
    each = plan.measured(made)[0]
    other = plan.Made(pathlib.Path("more"), each.stage, each.kind, 3 * each.work, timing.Took(1, 1, 6.0, 6.0, 7.0, 1))
    rate = plan.pace([each, other], each.stage, each.kind)
    assert (
        rate is not None and rate.seconds == pytest.approx((each.took.busy + 6) / (4 * each.work)) and rate.start == 1.0
    )


def test_the_funnel_is_in_the_pipelines_order(made: pathlib.Path) -> None:
    steps = plan.funnel(made)
    assert [(step["name"], step["stage"], step["rows"], step["inputs"]) for step in steps] == [
        ("code", "ingest", 12, []),
        ("clean", "decontaminate", 6, ["code"]),
        ("tokens", "tokenize", 6, ["clean"]),
    ]
    assert steps[0]["bytes"] == pytest.approx(12 * LENGTH, rel=0.02) and steps[1]["dropped"] == {"removed_ngram": 6}
    assert steps[1]["tokens"] == round(steps[1]["bytes"] / BYTES_PER_TOKEN)
    assert steps[2]["tokens"] == json.loads((made / "tokens" / "manifest.json").read_text())["tokens"]
    assert all(step["kind"] == "code" for step in steps)


def test_a_shard_that_is_missing_is_not_left_out_of_the_sums(made: pathlib.Path) -> None:
    shard = made / "code" / "00001.parquet"
    away = shard.rename(shard.with_suffix(".away"))
    for read in (plan.measured, plan.funnel):
        with pytest.raises(UserError, match=r"code/00001\.parquet: missing; leave that folder out, or run its stage"):
            read(made)
    away.rename(shard)
    assert plan.funnel(made)[0]["rows"] == 12


@pytest.mark.parametrize(
    ("options", "said"), [({"workers": 0}, "--workers 0"), ({"kept": 1.5}, "--kept 1.5"), ({"files": -1}, "--files -1")]
)
def test_options_that_make_no_sense_are_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Config(**options)


def test_a_folder_without_times_is_told(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "plan", "--run", str(tmp_path)]) == 2
    assert "no finished dataset there that says what it took" in capsys.readouterr().err
    run_stage(
        "synthesize",
        synthesize.Config(kind="exercises", output=tmp_path),
        tmp_path / "d",
        [],
        1,
        lambda *_: iter([{"content": "x", "hexsha": "y"}]),
        ingest.schema(),
        quiet=True,
    )
    assert main(["data", "plan", "--run", str(tmp_path), "--own"]) == 0
    assert re.search(r"^d +synthesize +1 ", capsys.readouterr().out, re.MULTILINE)
