"""The scripts are run by the shells themselves."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from phi1 import cli
from phi1.commands import COMMANDS

# Asks the function that `complete` names for the candidates of the last word, as bash does when Tab is pressed.
_ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
$(complete -p phi1 | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("completion") / "phi1.bash"
    path.write_bytes(subprocess.check_output([sys.executable, "-m", "phi1.cli", "completion", "bash"]))
    return path


def candidates(script: pathlib.Path, *words: str) -> set[str]:
    done = subprocess.run(["bash", "-c", _ASK, "bash", script, "phi1", *words], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return set(done.stdout.split())


def test_commands(script: pathlib.Path) -> None:
    words = {name.split()[0] for name in COMMANDS}
    assert candidates(script, "") == words | {"-h", "--help"}
    assert candidates(script, "data", "") == {n.split()[1] for n in COMMANDS if " " in n} | {"-h", "--help"}
    assert candidates(script, "data", "tok") == {"tokenize", "tokenizer"}


def test_options_and_their_choices(script: pathlib.Path) -> None:
    assert candidates(script, "data", "tokenize", "--inp") == {"--inputs"}
    assert candidates(script, "train", "recipes/pretrain-phi1.toml", "--ste") == {"--steps"}
    assert candidates(script, "train", "recipes/pretrain-phi1.toml", "--precision", "f") == {"fp16", "fp32"}


def test_paths(script: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exercises-clean").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "exercises-clean" in candidates(script, "data", "tokenize", "--output", "exer")
    assert candidates(script, "train", "exer") == set()  # then bash itself looks for files:
    shown = subprocess.check_output(["bash", "-c", 'source "$1"; complete -p phi1', "bash", script], text=True)
    assert "-o default" in shown


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_read_theirs(shell: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    text = capfd.readouterr().out
    assert "decontaminate" in text and "--max-new-tokens" in text
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on PATH (Debian: apt-get install {shell})")
    (tmp_path / "script").write_text(text)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)
