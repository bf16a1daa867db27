"""Launches the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from seer_kernels.sinkhorn.problem import Clouds, Cotangents, Gradients, Problem, Solution


def lacks(device: torch.device) -> str:
    """Why there is no kernel where the problems live; empty where there is one."""
    return "not yet"


def cost_matrix(clouds: Clouds) -> Tensor:
    raise NotImplementedError


def solve(problem: Problem) -> Solution:
    raise NotImplementedError


def gradients(problem: Problem, f: Tensor, g: Tensor, scale: Tensor, arrived: Cotangents) -> Gradients:
    raise NotImplementedError
