"""The contamination study at toy size: planted copies are pruned at every τ, and the model that saw them forgets what
it had by heart.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from data_tools import study, synthesize
from data_tools.dataset import Dataset, run_stage
from data_tools.study import Config
from phi1.errors import UserError
from phi1.evaluate import humaneval
from phi1.tokenizer import train_tokenizer

PROBLEMS = [humaneval.load()[i] for i in (0, 3, 9, 13, 24)]

RECIPE = """
[model]
vocab_size = 512
hidden_size = 64
intermediate_size = 128
num_layers = 1
num_heads = 2
num_kv_heads = 2
head_dim = 32
rotary_dim = 16
max_positions = 512
[data]
tokens = "set by the study"
sequence_length = 128
[train]
run_folder = "set by the study"
steps = 3
sequences_per_step = 2
micro_batch = 2
precision = "fp32"
tune = false
checkpoint_every = 3
[optimizer]
warmup_steps = 1
"""


@dataclasses.dataclass(frozen=True)
class _Made:
    count: int = 12


def config(folder: pathlib.Path, **options: Any) -> Config:
    problems = folder / "problems.jsonl"
    rows = [
        {
            "task_id": p.task_id,
            "prompt": p.prompt,
            "entry_point": p.entry_point,
            "test": p.test,
            "canonical_solution": p.solution,
        }
        for p in PROBLEMS
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(RECIPE)

    def produce(*_: Any) -> Iterator[dict[str, Any]]:
        for i in range(12):
            prompt, solution = (
                f'def step_{i}(x):\n    """Return {i} more, and so on."""\n',
                f"    y = [x, {i}]\n    return sum(y) * (y[0] - {i})\n",
            )
            content = prompt + solution
            yield {name: None for name in synthesize.schema("exercises").names} | {
                "hexsha": hashlib.sha1(content.encode()).hexdigest(),
                "content": content,
                "prompt": prompt,
                "solution": solution,
                "source": "here",
            }

    run_stage("made", _Made(), folder / "exercises", [], 1, produce, synthesize.schema("exercises"), quiet=True)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        train_tokenizer([p.prompt + p.solution for p in PROBLEMS] * 3, 512).save(tokenizer)
    return Config(
        **{
            "input": folder / "exercises",
            "output": folder / "study",
            "recipes": (folder / "recipe.toml",),
            "tokenizer": str(tokenizer),
            "problems": problems,
            "plant": 2,
            "copies": 2,
            "max_new_tokens": 4,
            "device": "cpu",
            "rates": (0.95, 0.8),
        }
        | options
    )


def test_planted_contamination_is_found_and_the_study_goes_on_where_it_was(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def interrupted(*arguments: Any) -> Any:
        if trained:
            raise KeyboardInterrupt
        trained.append("all")
        return real(*arguments)

    real = study._scored
    monkeypatch.setattr(study, "_scored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.run(config(tmp_path))
    monkeypatch.setattr(study, "_scored", real)
    before = (tmp_path / "study" / "all-evaluation" / "results.json").stat().st_mtime_ns
    capsys.readouterr()
    result = study.run(config(tmp_path))
    said = capsys.readouterr()
    assert "all is evaluated already" in said.err
    assert (tmp_path / "study" / "all-evaluation" / "results.json").stat().st_mtime_ns == before
    assert result["exercises"] == 16 and result["planted"] == 4
    for row in result["rows"]:
        assert row["planted_kept"] == 0 and row["pruned"] == 4 and (row["similar"], row["non-similar"]) == (2, 3)
        assert row["all"]["total"]["pass"] == 0 and row["retrained"]["similar"]["high"] > 0.5
    assert "on pruned" in said.out and "0.95    2/3" in said.out
    assert json.loads((tmp_path / "study" / "study.json").read_text()) == result
    # Scores of other settings are not those that are asked for.
    with pytest.raises(UserError, match=r"all-evaluation: .*max_new_tokens: 4 there, 5 asked, samples: 1 there, 2"):
        study.run(config(tmp_path, max_new_tokens=5, samples=2, temperature=0.8))


def test_the_table_sets_similar_problems_apart(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that has the planted problems by heart loses them, and only them, when they are pruned."""

    def scored(config: Config, problems: Any, name: str, data: pathlib.Path) -> dict[str, list[bool]]:
        seen = " ".join(Dataset(data).column("content"))
        return {problem.task_id: [problem.prompt in seen] for problem in problems}

    monkeypatch.setattr(study, "_scored", scored)
    result = study.run(config(tmp_path))
    for row in result["rows"]:
        assert row["all"]["similar"]["pass"] == 1 and row["all"]["non-similar"]["pass"] == 0
        assert row["all"]["total"]["pass"] == 0.4 and row["retrained"]["total"]["pass"] == 0
    clean = study.run(config(tmp_path, plant=0, output=tmp_path / "clean"))
    assert {(row["similar"], row["pruned"]) for row in clean["rows"]} == {(0, 0)}
    assert "–" in study.show(clean)  # no similar problem: no share


def test_bad_options(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="--plant 6: must be from 0 to the benchmark's 5"):
        study.run(config(tmp_path, plant=6))
    with pytest.raises(UserError, match="--rates and --recipes"):
        study.run(config(tmp_path, rates=()))


@pytest.mark.parametrize("rate", [2, -0.1, float("nan")])
def test_a_rate_is_refused_before_anything_is_trained(
    rate: float, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "_scored", lambda *arguments: pytest.fail("trained"))
    with pytest.raises(UserError, match=f"--rates {rate}: must be from 0 to 1"):
        study.run(config(tmp_path, rates=(0.9, rate)))


@pytest.mark.parametrize("given", [None, pathlib.Path("named")])
def test_the_first_recipe_starts_where_it_says(
    given: pathlib.Path | None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(tmp_path, init_from=given)
    recipe = options.recipes[0]
    recipe.write_text(recipe.read_text().replace("[train]\n", '[train]\ninit_from = "its-own"\n'))
    starts: list[pathlib.Path | None] = []

    def train(recipe: Any) -> None:
        starts.append(recipe.train.init_from)
        if len(starts) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("phi1.train.train", train)
    with pytest.raises(KeyboardInterrupt):
        study.run(dataclasses.replace(options, recipes=(recipe, recipe)))
    assert starts == [given or pathlib.Path("its-own"), options.output / "all-model-0"]
