"""`SamplesLoss` of geomloss: Sinkhorn divergences and entropic transport costs between clouds of points.

    from seer_kernels.integrations.geomloss import SamplesLoss

    distance = SamplesLoss("sinkhorn", p=2, blur=0.05)(x, y)  # numpy arrays in, numpy arrays out

geomloss makes a fixed number of steps, which `scaling` sets; here every problem runs until its marginals hold, and has
the values to which geomloss tends as `scaling` tends to 1. Gradients are those of the value. With `reach`, those of
geomloss 0.3 are not: to the points they are (reach^p + blur^p / 2) / (reach^p + blur^p) times as large. geomloss itself
is not needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from seer_kernels._checks import check_scalar
from seer_kernels.integrations._host import supported, to_host, to_tensors
from seer_kernels.sinkhorn import sinkhorn, sinkhorn_divergence


class SamplesLoss(nn.Module):
    """`geomloss.SamplesLoss("sinkhorn")`, `"tensorized"`.

    Args:
        loss: `"sinkhorn"`.
        p: 1 for costs |x - y|, 2 for |x - y|^2 / 2.
        blur: the weight of the entropy is blur^p.
        reach: None for balanced transport, or the weight of the marginals is reach^p.
        debias: the divergence, or else the transport objective.
        diameter, scaling: taken for the signature's sake; how the weight of the entropy is lowered needs no hints.
        truncate, cluster_scale, verbose: taken for the signature's sake, as by geomloss where it is `"tensorized"`.
        cost, kernel: must be None; potentials: must be False.
        backend: `"auto"` or `"tensorized"`.
        max_iterations, tolerance: as in `seer_kernels.sinkhorn`.

    Raises:
        ValueError: an option that is not supported.
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: int = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: None = None,
        kernel: None = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
        *,
        max_iterations: int = 1000,
        tolerance: float = 1e-4,
    ) -> None:
        super().__init__()
        supported("loss", loss, ("sinkhorn",), "geomloss.SamplesLoss")
        supported("p", int(p) if p == int(p) else p, (1, 2), "seer_kernels.sinkhorn_from_cost")
        supported("cost", cost, (None,), "seer_kernels.sinkhorn_from_cost")
        supported("kernel", kernel, (None,), "geomloss.SamplesLoss")
        supported("potentials", potentials, (False,), "the fields f and g of seer_kernels.sinkhorn's result")
        supported("backend", backend, ("auto", "tensorized"), "geomloss.SamplesLoss on KeOps")
        for name, scale in (("blur", blur), ("reach", reach)):
            if scale is not None:
                check_scalar(name, scale)
                if not scale > 0:
                    raise ValueError(f"{name} must be positive; got {scale}")
        self.loss = loss
        self.p = int(p)
        self.blur = blur
        self.reach = reach
        self.debias = debias
        self.max_iterations = max_iterations
        self.tolerance = tolerance

    def forward(self, *arguments: Any) -> Any:
        """The loss of clouds `(x, y)` or, with weights, `(a, x, b, y)`, torch or numpy.

        Clouds are (B, N, D) and (B, M, D), or without the B; weights (B, N) or (B, N, 1), and uniform by default.

        Returns:
            (B,), or () without the B.

        Raises:
            TypeError, ValueError: bad input, such as balanced weights with unequal sums.

        Warns:
            ConvergenceWarning: as `seer_kernels.sinkhorn`.
        """
        if len(arguments) not in (2, 4):
            raise ValueError(
                f"expected (x, y) or (weights of x, x, weights of y, y); got {len(arguments)} arguments"
                + (". Cluster labels are for the backend 'multiscale' of geomloss" if len(arguments) == 6 else "")
            )
        names = ("x", "y") if len(arguments) == 2 else ("a", "x", "b", "y")
        tensors, numpy = to_tensors(**dict(zip(names, arguments, strict=True)))
        x, y = tensors["x"], tensors["y"]
        a, b = (_weights(tensors.get(name), cloud) for name, cloud in (("a", x), ("b", y)))
        # The kernels know |x - y|^2, twice the cost: so is everything that it is weighed against.
        unit = 2.0 if self.p == 2 else 1.0
        eps = self.blur**self.p
        tau = None if self.reach is None else unit * self.reach**self.p
        options: dict[str, Any] = {
            "a": a,
            "b": b,
            "eps": unit * eps,
            "cost": "sqeuclidean" if self.p == 2 else "euclidean",
            "tau_a": tau,
            "tau_b": tau,
            "max_iterations": self.max_iterations,
            "tolerance": self.tolerance,
        }
        if self.debias:
            return to_host(sinkhorn_divergence(x, y, **options) / unit, numpy)
        result = sinkhorn(x, y, **options)
        value = result.value / unit
        if tau is not None:  # geomloss takes the entropy relative to another constant there
            a_mass, b_mass = result.a.sum(-1), result.b.sum(-1)
            value = value + eps * ((a_mass + b_mass) / 2 - a_mass * b_mass)
        return to_host(value, numpy)

    def extra_repr(self) -> str:
        return f"p={self.p}, blur={self.blur}, reach={self.reach}, debias={self.debias}"


def _weights(weights: Tensor | None, cloud: Tensor | None) -> Tensor | None:
    """Weights without the last dimension of size 1 that geomloss allows."""
    if weights is None or cloud is None or weights.dim() != cloud.dim() or weights.shape[-1] != 1:
        return weights
    return weights.squeeze(-1)
