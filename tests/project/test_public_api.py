"""The public surface, as a snapshot: a change to it is meant, and is in the changelog.

python tests/project/test_public_api.py  # writes the snapshot anew
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seer_kernels

SNAPSHOT = Path(__file__).with_name("public_api.txt")
MODULES = (
    "seer_kernels",
    "seer_kernels.distributed",
    "seer_kernels.info",
    "seer_kernels.integrations.geomloss",
    "seer_kernels.integrations.open_clip",
    "seer_kernels.integrations.pot",
)
"""Those that need no other package than torch and numpy."""
OF_HOSTS = {
    "seer_kernels.integrations.sentence_transformers": "sentence_transformers",
    "seer_kernels.integrations.pytorch_metric_learning": "pytorch_metric_learning",
}


def public(module: object) -> list[str]:
    """Names that a module offers: its `__all__`, or what it defines itself."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    defined = (n for n, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__)  # type: ignore[attr-defined]
    return sorted(name for name in defined if not name.startswith("_"))


def surface() -> str:
    lines = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        lines.append(f"# {module_name}")
        for name in public(module):
            member = getattr(module, name)
            if inspect.isclass(member) and issubclass(member, Warning):
                lines.append(f"class {name}({member.__base__.__name__})")
            elif inspect.isclass(member):
                fields = getattr(member, "_fields", ())
                lines.append(f"class {name}" + (f": {', '.join(fields)}" if fields else f"{signature(member)}"))
                own = (n for n, x in vars(member).items() if inspect.isfunction(x) or isinstance(x, property))
                for method in sorted(n for n in own if not n.startswith("_") and n != "extra_repr"):
                    found = vars(member)[method]
                    lines.append(f"    {method}" + (signature(found) if inspect.isfunction(found) else ""))
            elif callable(member):
                lines.append(f"def {name}{signature(member)}")
            elif not inspect.ismodule(member):
                lines.append(name)
    return "\n".join(lines) + "\n"


def signature(member: object) -> str:
    """Names, kinds and defaults of arguments; annotations are the type checker's."""
    found = inspect.signature(member)  # type: ignore[arg-type]
    bare = [p.replace(annotation=p.empty, default=_Named(p.default)) for p in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=found.empty))


class _Named:
    """A default whose text does not hold its address."""

    def __new__(cls, value: object) -> object:  # type: ignore[misc]
        return object.__new__(cls) if inspect.isfunction(value) else value

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return str(getattr(self.value, "__qualname__", self.value))


def test_the_public_surface_is_the_snapshot() -> None:
    assert surface() == SNAPSHOT.read_text(encoding="utf-8"), f"if it is meant: python {__file__}"


@pytest.mark.parametrize("module", OF_HOSTS)
def test_the_integrations_that_extend_their_host(module: str) -> None:
    if importlib.util.find_spec(OF_HOSTS[module]) is None:
        with pytest.raises(ImportError, match=r"this integration of seer_kernels needs the package"):
            importlib.import_module(module)
        pytest.skip(f"not installed: {OF_HOSTS[module]}")
    names = public(importlib.import_module(module))
    expected = {
        "sentence_transformers": ["CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss", "SupConLoss"],
        "pytorch_metric_learning": ["NTXentLoss", "SupConLoss"],
    }
    assert names == expected[OF_HOSTS[module]]


def test_importing_the_package_imports_no_host() -> None:
    kept_out = {
        "seer_kernels.integrations",
        "sentence_transformers",
        "pytorch_metric_learning",
        "open_clip",
        "ot",
        "geomloss",
        "transformers",
    }
    code = f"import sys, seer_kernels; print({kept_out} & sys.modules.keys() or 'none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"


@pytest.mark.parametrize(
    ("integration", "host"),
    [
        ("sentence_transformers", "sentence_transformers"),
        ("pytorch_metric_learning", "pytorch_metric_learning"),
        ("pot", "ot"),
    ],
)
def test_an_absent_host_is_named(integration: str, host: str) -> None:
    use = "import torch; module.solve_batch(torch.ones(1, 2, 2), 0.1)" if integration == "pot" else ""
    code = (
        f"import sys, importlib; sys.modules[{host!r}] = None; "
        f"module = importlib.import_module('seer_kernels.integrations.{integration}'); {use}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: this integration of seer_kernels needs the package" in done.stderr


def test_types_are_shipped() -> None:
    assert (Path(seer_kernels.__file__).parent / "py.typed").exists()


def test_the_report_for_bugs_names_every_backend(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "seer_kernels.info"]  # from elsewhere: the package that is installed
    report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert report.startswith("Paste the lines below into a bug report")
    assert f"seer-kernels {seer_kernels.__version__}\n" in report
    assert f"python {platform.python_version()} " in report
    assert re.search(r"^native module: \S+ of \S+, CUDA architectures \S+$", report, re.MULTILINE)
    assert f"torch {torch.__version__} " in report
    for status in seer_kernels.backends().values():
        assert f"backend {status.name}: " in report
        assert status.reason in report


if __name__ == "__main__":
    SNAPSHOT.write_text(surface(), encoding="utf-8")
