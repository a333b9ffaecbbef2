"""The gold set: the file that is shipped, texts from packages and wheels, and the way from source to annotation."""

import collections
import dataclasses
import importlib.metadata
import json
import pathlib
import re
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

from data_tools import annotate, gold, ingest, readers
from data_tools.dataset import Dataset
from data_tools.units import ContentHashes
from phi1.errors import UserError

ROOT = pathlib.Path(gold.__file__).resolve().parents[1]
CODE = [f"def function_{i}(x):\n    y = x + {i}\n    return y * {i}" for i in range(6)]
"""Snippets of the made package: its file has them one after another, with a line between."""


def rows() -> list[dict[str, Any]]:
    """Lines of a labels file for the made package, of labels 0, 2, 4, 6, 8, 10; the last two are held out."""
    return [
        {
            "package": "made-up",
            "version": "1.5",
            "path": "made_up/code.py",
            "lines": [4 * i + 1, 4 * i + 3],
            "sha256": gold.digest(text),
            "label": 2 * i,
            "reason": f"Reason {i}.",
            "held_out": i >= 4,
        }
        for i, text in enumerate(CODE)
    ]


@pytest.fixture
def made(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A labels file in the place of the shipped one, and the wheel that it quotes in the cache; the folder of
    wheels.
    """
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    monkeypatch.setattr(gold, "LABELS", labels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = tmp_path / "cache" / "phi1" / "packages"
    folder.mkdir(parents=True)
    wheel(folder, "\n\n".join(CODE))
    return folder


def wheel(folder: pathlib.Path, code: str, path: str = "made_up/code.py") -> None:
    with zipfile.ZipFile(folder / "made_up-1.5-py3-none-any.whl", "w") as archive:
        archive.writestr(path, code)
        archive.writestr("made_up-1.5.dist-info/METADATA", "Name: made-up\nLicense-Expression: MIT\n\nWhat it is.\n")


def test_the_shipped_labels_are_whole() -> None:
    snippets = gold.load()
    assert len(snippets) >= 600 and len({s.sha256 for s in snippets}) == len(snippets)
    assert all(0 <= s.label <= 10 and 12 <= s.last - s.first + 1 <= 60 for s in snippets)
    assert all(s.reason.endswith(".") and len(s.reason.split()) >= 2 for s in snippets)
    again = [s.again for s in snippets if s.again is not None]
    assert len(again) == 60 and all(0 <= label <= 10 for label in again)
    sides = collections.defaultdict(set)
    for s in snippets:
        sides[s.package].add(s.held_out)
    assert all(len(side) == 1 for side in sides.values())  # a package is held out whole
    assert 0.18 < sum(s.held_out for s in snippets) / len(snippets) < 0.22


def test_each_quoted_version_is_one_that_the_setup_installs() -> None:
    text = (ROOT / "constraints.txt").read_text() + (ROOT / "packaged-models.txt").read_text()
    pinned = {name.lower().replace("_", "-"): version for name, version in re.findall(r"(?m)^([\w-]+)==([\w.]+)", text)}
    for package, version in {(s.package, s.version) for s in gold.load()}:
        assert pinned.get(package.lower().replace("_", "-")) == version, package


def test_what_is_installed_is_what_was_labelled(tmp_path: pathlib.Path) -> None:
    """Reads every snippet of each package that is installed in the quoted version, and no wheel."""
    versions = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    here = [s for s in gold.load() if versions.get(s.package.lower().replace("_", "-")) == s.version]
    if not here:
        pytest.skip("none of the quoted versions is installed (constraints.txt pins them for Python 3.11 on)")
    assert [snippet for snippet, _, _ in gold.texts(here, tmp_path)] == here
    assert not list(tmp_path.iterdir())


def test_texts_come_from_a_wheel_where_the_version_is_not_installed(made: pathlib.Path) -> None:
    found = list(gold.texts(gold.load()))
    assert [text for _, text, _ in found] == CODE
    assert {metadata["License-Expression"] for _, _, metadata in found} == {"MIT"}
    wheel(made, "\n\n".join(CODE), "made_up-1.5.data/purelib/made_up/code.py")
    assert [text for _, text, _ in gold.texts(gold.load())] == CODE


def test_another_text_a_file_that_is_gone_and_a_package_that_cannot_be_had_are_told(made: pathlib.Path) -> None:
    wheel(made, "\n\n".join(CODE).replace("x + 3", "x - 3"))
    with pytest.raises(
        UserError, match=r"made-up 1\.5: lines 13 to 15 of made_up/code\.py are not those that were labelled"
    ):
        list(gold.texts(gold.load()))
    wheel(made, "", "made_up/other.py")
    with pytest.raises(UserError, match=r"made-up 1\.5: has no made_up/code\.py"):
        list(gold.texts(gold.load()))
    path = next(made.glob("*.whl"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"made_up-1\.5-py3-none-any\.whl: cannot be read \(.*delete it"):
        list(gold.texts(gold.load()))
    path.unlink()
    with pytest.raises(
        UserError,
        match=r"made-up 1\.5, which the gold set quotes, is not installed and cannot be downloaded \(.*pip install",
    ):
        list(gold.texts(gold.load()))


def test_from_the_source_to_the_annotations(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    documents = ingest.run(ingest.Config(output=tmp_path / "gold", sources=("gold",)))
    read = {row["content"]: row for row in documents.read()}
    assert set(read) == set(CODE)
    assert {row["source"] for row in read.values()} == {"gold:made-up==1.5"}
    assert read[CODE[1]]["max_stars_repo_path"] == "made_up/code.py#L5-L7"
    assert read[CODE[1]]["max_stars_repo_licenses"] == ["MIT"]

    config = annotate.Config(input=tmp_path / "gold", output=tmp_path / "annotated", mode="gold", threshold=6)
    labelled = {row["content"]: row for row in annotate.run(config).read()}
    for i, text in enumerate(CODE):
        row = labelled[text]
        assert (row["score"], row["label"], row["held_out"]) == (2.0 * i, int(2 * i >= 6), i >= 4)
        assert (row["group"], row["reasoning"], row["model"]) == ("made-up", f"Reason {i}.", "gold")
    some = annotate.run(dataclasses.replace(config, output=tmp_path / "some", samples=2))
    assert [row["hexsha"] for row in some.read()] == annotate.sample(documents, 2, 0)


def test_documents_without_a_gold_label_are_left_out_and_none_at_all_is_told(
    made: pathlib.Path, make_documents: Callable[..., Dataset], tmp_path: pathlib.Path
) -> None:
    mixed = make_documents([CODE[0], "x = 1\n", CODE[5]], name="mixed")
    config = annotate.Config(input=mixed.folder, output=tmp_path / "annotated", mode="gold", threshold=5)
    assert {row["content"] for row in annotate.run(config).read()} == {CODE[0], CODE[5]}
    others = make_documents(["x = 1\n"], name="others")
    with pytest.raises(UserError, match="the gold set labels none of its documents; ingest --sources gold"):
        annotate.run(dataclasses.replace(config, input=others.folder, output=tmp_path / "none"))


def test_a_part_has_whole_packages_and_enough_parts_for_cores(tmp_path: pathlib.Path) -> None:
    units = readers.plan(("gold",), ContentHashes(tmp_path / "hashes.json"), any_license=False)
    packages = collections.Counter(snippet.package for snippet in gold.load())
    assert [name for unit in units for name in unit.items] == list(packages)
    assert [unit.part for unit in units] == [(i, len(units)) for i in range(len(units))] and len(units) >= 5
    assert len({unit.made_of for unit in units}) == len(units)
    assert max(sum(packages[name] for name in unit.items) for unit in units) < 200
