"""What an installed wheel must do, with torch and numpy and nothing else: `python smoke.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import seer_kernels as sk


def evaluate() -> dict[str, tuple[torch.Tensor, ...]]:
    """Every family by every backend that a CPU has, by "name backend": its value and its gradients on small inputs."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    labels = torch.arange(12) % 5
    calls = {
        "info_nce": lambda x, y, b: sk.info_nce(x, y, query_labels=labels, same_label="ignore", backend=b),
        "nt_xent": lambda x, y, b: sk.nt_xent(x, y, backend=b),
        "sup_con": lambda x, y, b: sk.sup_con(x, labels, keys=y, key_labels=labels, backend=b),
        "siglip": lambda x, y, b: sk.siglip(x, y, temperature=0.1, bias=-2.0, backend=b),
        "ot_contrastive": lambda x, y, b: sk.ot_contrastive(x, y, backend=b),
        "sinkhorn": lambda x, y, b: sk.sinkhorn(x, y, eps=20.0, tolerance=1e-9, backend=b).value,
        "sinkhorn_divergence": lambda x, y, b: sk.sinkhorn_divergence(x, y, eps=20.0, tolerance=1e-9, backend=b),
    }
    results = {}
    for backend in ("native", "reference"):
        for name, call in calls.items():
            x, y = first.clone().requires_grad_(), second.clone().requires_grad_()
            loss = call(x, y, backend).sum()
            results[f"{name} {backend}"] = (loss.detach(), *torch.autograd.grad(loss, (x, y)))
    return results


def main() -> None:
    print(f"seer_kernels of {Path(sk.__file__).parent}")
    status = sk.backends()
    assert status["native"].available, status["native"].reason
    results = evaluate()
    for name, values in results.items():
        wanted = results[f"{name.split()[0]} reference"]
        for got, want in zip(values, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
    assert (Path(sk.__file__).parent / "py.typed").exists()
    report = subprocess.run([sys.executable, "-m", "seer_kernels.info"], check=True, capture_output=True, text=True)
    assert f"torch {torch.__version__} " in report.stdout, report.stdout
    print(report.stdout)
    print(f"{len(results)} results and their gradients agree")


if __name__ == "__main__":
    main()
