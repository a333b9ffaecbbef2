"""A server of the sandbox: what of the machine it is given."""

import pathlib

import pytest

from phi1.evaluate import sandbox
from phi1.evaluate.inside import visible
from phi1.evaluate.sandbox import Job


@pytest.mark.parametrize("entry", [".", "..", "", "{folder}", "{folder}/..", "/", "{folder}/lib/.."])
def test_no_entry_of_the_library_path_opens_the_project(
    entry: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Nor does it cost the sandbox its strength."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "secret").write_text("sk-secret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{entry.format(folder=tmp_path)}:{tmp_path}/lib")
    best = sandbox.strength().level
    server = sandbox.Server()
    try:
        result = server.run(
            Job(f"import os\nprint(os.listdir({str(tmp_path / 'lib')!r}))\nopen({str(tmp_path / 'secret')!r})")
        )
        assert server.strength.level == best
    finally:
        server.close()
    assert result.output == "[]\n" and result.detail.startswith(("FileNotFoundError", "PermissionError"))


def test_entries_of_the_library_path() -> None:
    private = ("/home/ann", "/srv/work/project", "/opt/conda/lib/python3.12/site-packages/phi1")
    for entry, shown in {
        "/usr/local/cuda/lib64": True,
        "/home/ann/lib": True,
        "/home/ann": False,
        "/home": False,
        "/srv/work/other/..": False,
        "/opt/conda/lib": True,  # what is installed for its Python is hidden
        "lib": False,
        "/": False,
    }.items():
        assert visible.library_path(f"{entry}:/lib", private) == (f"{entry}:/lib" if shown else "/lib"), entry
