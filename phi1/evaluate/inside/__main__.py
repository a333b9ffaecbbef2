"""Starts the server: `python -I -S inside/__main__.py`. The project's own packages are named, but not run: what they
import, every fork would pay for."""

import os
import sys
import types

_here = os.path.dirname(os.path.abspath(__file__))
for _name, _folder in (("phi1", "../.."), ("phi1.evaluate", "..")):
    sys.modules[_name] = types.ModuleType(_name)
    sys.modules[_name].__path__ = [os.path.normpath(os.path.join(_here, _folder))]

from phi1.evaluate.inside.server import main  # noqa: E402

main()
