"""Diversity: what is masked, which texts are near twins, and that each measure moves the right way."""

import json
import math
import pathlib
import random
import re
from typing import Any

import numpy
import pytest

from data_tools import diversity, teacher
from data_tools.dataset import run_stage
from data_tools.diversity import Config, Twins, bound_names, mask, measure, ngrams, score, vendi
from phi1.errors import UserError

EXERCISE = '''def keep_long_words(words):
    """Keep the words with more than 7 characters, and add 'end'.

    >>> keep_long_words(['a', 'elephants'])
    ['elephants', 'end']
    """
    kept = [w for w in words if len(w) > 7]
    return kept + ['end']
'''
RENAMED = (
    EXERCISE.replace("keep_long_words", "red_roofs")
    .replace("7", "12")
    .replace("end", "zim")
    .replace("kept", "result")
    .replace("elephants", "hippopotamuses")
)


@pytest.fixture(scope="module")
def contents() -> list[str]:
    return [row["prompt"] + row["solution"] for row in teacher.write_exercises(300, "diversity", "train", {})]


def test_mask_leaves_out_names_constants_and_examples() -> None:
    tokens = mask(EXERCISE)
    assert " ".join(tokens) == (
        'def _ ( _ ) : keep the _ with more than 0 characters , and add " . '
        '_ = [ _ for _ in _ if len ( _ ) > 0 ] return _ + [ " ]'
    )
    assert mask(RENAMED) == tokens


@pytest.mark.parametrize(
    "example",
    [
        "    >>> f(1)\n    2\n",
        "    >>> f(1)\n    2\n    >>> f(2)\n    3\n",
        "    >>> f(\n    ...     1)\n    [1,\n     2]\n",
        "    >>> f(1)\n",
    ],
)
def test_examples_go_and_what_stands_beside_them_stays(example: str) -> None:
    text = f'def f(v):\n    """Before it.\n\n{example}\n    After it.\n    """\n    return v >> 1\n'
    assert " ".join(mask(text)) == "def _ ( _ ) : before it . after it . return _ > > 0"
    text = f'def f(v):\n    """Before it.\n\n{example}    """\n    return v\n'
    assert " ".join(mask(text)) == "def _ ( _ ) : before it . return _"


def test_names_of_code_in_prose_are_found() -> None:
    text = "# Counting\n\nHere is `tally`:\n\n```python\ndef tally(items):\n    total = 0\n    return total\n```\nMore prose.\n"
    assert bound_names(text) == {"tally", "items", "total"}
    assert "more" in mask(text) and "tally" not in mask(text)
    assert bound_names("no code at all") == set()


def test_a_renamed_exercise_is_a_twin_and_another_is_not() -> None:
    twins = Twins()
    other = EXERCISE.replace("kept = [w for w in words if len(w) > 7]", "kept = sorted(set(words), key=len)[:7]")
    assert [twins.add(mask(text)) for text in (EXERCISE, other, RENAMED)] == [None, None, 0]


def test_twins_are_those_of_a_search_over_all_pairs(contents: list[str]) -> None:
    """Against the definition, on exercises with words changed so that many pairs lie about the threshold."""
    rng = random.Random(0)
    texts = [mask(text) for text in contents[:60]]
    for tokens in list(texts):
        for changes in (1, 2, 3, 4):
            texts.append([rng.choice("uvwxyz") if rng.random() < changes / len(tokens) else token for token in tokens])
    rng.shuffle(texts)
    grams = [frozenset(ngrams(tokens, diversity.NGRAM)) for tokens in texts]

    def jaccard(i: int, j: int) -> float:
        return len(grams[i] & grams[j]) / len(grams[i] | grams[j])

    twins = Twins()
    found = wanted = 0
    for i, tokens in enumerate(texts):
        other = twins.add(tokens)
        assert other is None or (other < i and jaccard(other, i) >= diversity.JACCARD)
        found += other is not None
        wanted += any(jaccard(i, j) >= diversity.JACCARD for j in range(i))
    assert 50 < wanted < 250
    assert 0.97 * wanted <= found <= wanted


def test_short_texts_are_compared_too() -> None:
    twins = Twins()
    assert [twins.add(tokens) for tokens in ([], ["a"], ["a"], [], ["a", "b"])] == [None, None, 1, 0, None]


def test_vendi_score_counts_what_is_different() -> None:
    """n texts without a word in common score n; n equal ones 1; two groups 2."""
    apart = [[f"{i}x{j}" for j in range(20)] for i in range(12)]
    assert vendi(apart) == pytest.approx(12)
    assert vendi([apart[0]] * 12) == pytest.approx(1)
    assert vendi(apart[:2] * 6) == pytest.approx(2)
    kernel = numpy.array([[1.0, 0.5], [0.5, 1.0]])  # eigenvalues of K / 2: 0.75 and 0.25
    assert score(4 * kernel) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_measures_tell_many_families_from_few(contents: list[str]) -> None:
    """Mutation of the data: the same number of rows from a tenth of the texts, under other names and constants."""
    rng = random.Random(1)

    def renamed(text: str) -> str:
        name = re.search(r"def (\w+)", text)
        assert name is not None
        return text.replace(name[1], f"name_{rng.randrange(10**6)}").replace(" 5", f" {rng.randrange(10)}")

    few = [renamed(rng.choice(contents[:30])) for _ in contents]
    many, less = (measure(texts)["points"][-1] for texts in (contents, few))
    assert many["near_twins"] < 0.05 and less["near_twins"] > 0.85
    assert many["shapes"] > 5 * less["shapes"]
    assert many["compression"] < less["compression"] / 2
    assert many["vendi"] > 1.3 * less["vendi"]
    assert all(many[f"distinct_{n}"] > 2 * less[f"distinct_{n}"] for n in diversity.DISTINCT)


def test_sizes_end_with_the_whole_sample() -> None:
    assert diversity.sizes(1200) == [100, 200, 500, 1000, 1200]
    assert diversity.sizes(1000) == [100, 200, 500, 1000]
    assert diversity.sizes(3) == [3]


def dataset(folder: pathlib.Path, contents: list[str]) -> None:
    import pyarrow as pa

    rows = [{"content": content} for content in contents]
    run_stage("made", Config(input=folder), folder, [], 1, lambda *_: rows, pa.schema([("content", pa.string())]))


def test_the_command_writes_what_the_report_reads(
    tmp_path: pathlib.Path, contents: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path / "rows", contents)
    measured: dict[str, Any] = diversity.run(Config(input=tmp_path / "rows", rows=200))
    assert "near twins" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows" / diversity.FILE).read_text()) == measured == diversity.read(tmp_path / "rows")
    assert [point["rows"] for point in measured["points"]] == [100, 200] and measured["rows_in_dataset"] == 300
    assert diversity.run(Config(input=tmp_path / "rows", rows=200)) == measured
    assert diversity.run(Config(input=tmp_path / "rows", rows=200, seed=1))["points"] != measured["points"]
    dataset(tmp_path / "others", contents[:20])
    (tmp_path / "rows" / diversity.FILE).rename(tmp_path / "others" / diversity.FILE)
    assert diversity.read(tmp_path / "others") is None  # of another dataset
    assert diversity.read(tmp_path / "rows") is None


def test_what_cannot_be_measured_is_said(tmp_path: pathlib.Path) -> None:
    dataset(tmp_path / "empty", [])
    with pytest.raises(UserError, match="holds no rows"):
        diversity.run(Config(input=tmp_path / "empty"))
    with pytest.raises(UserError, match="--rows 0"):
        diversity.run(Config(input=tmp_path / "empty", rows=0))
