"""Which of the machine's files a sandboxed process can see: the interpreter's library, shared libraries, no other
package.
"""

import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from typing import NamedTuple

FILES = ("/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/urandom", "/dev/random", "/dev/zero")
# Under folders of shared libraries: other interpreters, and packages installed for them.
_HIDDEN = ("python", "pypy", "site-packages", "dist-packages", "node_modules")


class Tree(NamedTuple):
    """A folder or file that is shown, but for the direct children named in `hidden`."""

    path: str
    hidden: tuple[str, ...] = ()

    def parts(self) -> Iterator[str]:
        """Paths that together show the tree, and nothing hidden."""
        if not self.hidden:
            yield self.path
        else:
            yield from (os.path.join(self.path, name) for name in os.listdir(self.path) if name not in self.hidden)


def library_path(text: str, private: Sequence[str]) -> str:
    """The entries of an LD_LIBRARY_PATH that a sandbox can show: absolute ones, through which none of the private
    folders is seen.
    """
    entries = [entry for entry in text.split(":") if os.path.isabs(entry)]
    return ":".join(entry for entry in entries if not any(_shows(entry, folder) for folder in private))


def _shows(entry: str, folder: str) -> bool:
    """Whether a folder is, or lies in, what is shown of an entry."""
    path, folder = os.path.realpath(entry), os.path.realpath(folder)
    if os.path.commonpath((path, folder)) != path:
        return False
    return not os.path.relpath(folder, path).startswith(_HIDDEN)


def trees(packages: tuple[str, ...]) -> list[Tree]:
    """Everything shown, in order of path, and by its real path as well where a link leads to it. packages: names of
    imported packages, shown with what they imported."""
    library = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    paths = {os.path.join(sys.base_prefix, "lib"), "/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/share/zoneinfo"}
    paths |= library | set(FILES) | set(filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")))
    hidden = {
        name: _hidden_in(name) for path in paths if os.path.exists(path) for name in (path, os.path.realpath(path))
    }
    if packages:
        hidden |= {name: () for path in _of_packages(library) for name in (path, os.path.realpath(path))}
    return [Tree(path, hidden[path]) for path in sorted(hidden)]


def _hidden_in(path: str) -> tuple[str, ...]:
    if not os.path.isdir(path):
        return ()
    return tuple(name for name in os.listdir(path) if name.startswith(_HIDDEN))


def _of_packages(library: set[str]) -> Iterator[str]:
    """Folders and files of the imported modules that are not the standard library's, nor this project's."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or "." in name or (file.startswith(tuple(library)) and "-packages" not in file):
            continue
        folder = os.path.dirname(file)
        if os.path.basename(file).startswith("__init__."):
            yield folder
            beside = os.path.join(os.path.dirname(folder), f"{name}.libs")  # shared libraries that a wheel brings
            if os.path.isdir(beside):
                yield beside
        elif name != "__main__":
            yield file
