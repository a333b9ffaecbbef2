"""README and docs say what is so: their commands exist and run, their figures are what the script draws, LOG.md's index
is whole.
"""

import dataclasses
import importlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from data_tools import ingest
from phi1.commands import COMMANDS
from phi1.config import TrainConfig
from phi1.tokenizer import train_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _code(page: pathlib.Path) -> str:
    """What a page shows as code, fenced or indented; lines that a backslash ends are joined."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"^ {4}(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return "\n".join(blocks).replace("\\\n", " ")


def _commands() -> list[tuple[str, str]]:
    """(page, command line) of every phi1 command that is shown."""
    found = []
    for page in PAGES:
        for line in _code(page).splitlines():
            line = re.sub(r"^(torchrun .*?phi1/train\.py)", "phi1 train", line.strip())
            if line.startswith("phi1 "):
                found.append((page.name, line.partition("  #")[0].strip()))
    return found


@pytest.mark.parametrize(("page", "line"), _commands(), ids=lambda text: text[:60])
def test_commands_and_their_options_exist(page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    name = " ".join(words[: 2 if words[0] == "data" else 1])
    assert name in COMMANDS
    if name == "train":
        fields = {field.name for table in dataclasses.fields(TrainConfig) for field in dataclasses.fields(table.type)}
        assert words[1].startswith("-") or words[1] == "RECIPE" or (ROOT / words[1]).exists()
    else:
        fields = {field.name for field in dataclasses.fields(importlib.import_module(COMMANDS[name][0]).Config)}
    for word in words:
        if word.startswith("--") and word != "--help":
            option = word[2:].partition("=")[0].replace("-", "_")
            assert {option, option.removeprefix("no_")} & fields, f"{page}: {word} is no option of phi1 {name}"


def _readme_block(sought: str) -> str:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if sought in block).replace("\\\n", " ")


def _with_options(block: str, options: dict[str, str]) -> str:
    """The block with options added to its commands that match, and all else as printed."""
    for command, added in options.items():
        block, count = re.subn(f"^({command}.*)$", rf"\1 {added}", block, flags=re.MULTILINE)
        assert count, f"README shows no {command}"
    return block


def _run(block: str, folder: pathlib.Path) -> str:
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-euc", block], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def test_the_readme_trains_on_a_users_own_files(tmp_path: pathlib.Path) -> None:
    """Its commands as printed, but for fewer steps."""
    shutil.copytree(ROOT / "phi1", tmp_path / "my-code", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    few = {"phi1 train": "--steps 4 --warmup-steps 1 --no-tune", "phi1 generate": "--max-new-tokens 4"}
    assert "step 4/4" in _run(_with_options(_readme_block("folder:my-code"), few), tmp_path)


def test_the_readme_trains_phi_1(tmp_path: pathlib.Path) -> None:
    """Its commands as printed, on one process, with a small tokenizer, the smallest preset and two steps."""
    (tmp_path / "phi1").symlink_to(ROOT / "phi1")
    (tmp_path / "recipes").mkdir()
    for name in ("pretrain-phi1.toml", "finetune-phi1.toml"):
        recipe = (ROOT / "recipes" / name).read_text()
        assert 'preset = "phi1"' in recipe
        (tmp_path / "recipes" / name).write_text(
            recipe.replace('preset = "phi1"', 'preset = "phi1-tiny"\nmax_positions = 2048')
        )
    texts = [f"def add_{i}(x):\n    return x + {i}\n" for i in range(400)]
    train_tokenizer(texts, 320).save(tmp_path / "tokenizer.json")
    for name in ("code", "textbooks", "exercises"):
        (tmp_path / "files" / name).mkdir(parents=True)
        for i, text in enumerate(texts):
            (tmp_path / "files" / name / f"{i}.py").write_text(f"# {name}\n{text}")
        ingest.run(ingest.Config(sources=(f"folder:{tmp_path / 'files' / name}",), output=tmp_path / name))
    small = (
        "--steps 2 --sequences-per-step 2 --micro-batch 1 --sequence-length 32 --precision fp32 "
        "--checkpoint-every 2 --evaluate-every 2 --warmup-steps 1 --no-tune"
    )
    block = _with_options(
        _readme_block("recipes/pretrain-phi1.toml").replace("--nproc-per-node 8", "--nproc-per-node 1"),
        {
            "phi1 data tokenize": "--tokenizer tokenizer.json",
            "torchrun .*pretrain": small,
            "torchrun .*finetune": f"{small} --init-from runs/pretrain-phi1/step-000002",
            "phi1 evaluate": "--limit 1 --max-new-tokens 2",
        },
    )
    assert "pass@1" in _run(block, tmp_path)
    assert (tmp_path / "phi-1-hf" / "model.safetensors").exists()


@pytest.mark.parametrize("page", ["README.md", "docs/kernels.md"])
def test_the_kernel_that_is_shown_runs(page: str) -> None:
    text = (ROOT / page).read_text()
    lines = re.search(r"^( *)import torch\n.*?backward\(\)\n", text, re.DOTALL | re.MULTILINE)
    assert lines is not None
    exec(re.sub(f"^{lines[1]}", "", lines[0], flags=re.MULTILINE), {})


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_figures_are_what_the_script_draws() -> None:
    specification = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert specification is not None and specification.loader is not None
    figures = sys.modules["figures"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(figures)
    for name, draw in figures.FIGURES.items():
        assert (figures.FOLDER / name).read_text() == draw(), f"python docs/figures.py writes {name} anew"


def test_the_logs_index_lists_every_entry() -> None:
    text = (ROOT / "LOG.md").read_text()
    entries = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert re.findall(r"^- (\d{4}-\d\d-\d\d · .*)$", text, re.MULTILINE) == entries
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d · .+ · .+", entry) for entry in entries)
