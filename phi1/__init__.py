"""phi-1 ("Textbooks Are All You Need", arXiv 2306.11644) as software: model, trainer, evaluation."""

import importlib.util
import pathlib

__version__ = "0.1.0"


def _require_own_kernels() -> None:
    # PyPI has an unrelated package named `kernels`; installed beside ours it would win the import.
    spec = importlib.util.find_spec("kernels")
    found = pathlib.Path(spec.origin).resolve() if spec and spec.origin else None
    expected = pathlib.Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
    if found != expected:
        raise ImportError(
            f"phi1 needs its own package `kernels` ({expected}), but `import kernels` finds {found}: "
            "run `pip uninstall kernels` and `pip install -e .` again"
        )


_require_own_kernels()
