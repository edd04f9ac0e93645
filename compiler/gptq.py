"""GPTQ for MXFP4: weights rounded column by column, each error made good by later columns.

What is kept small is not |w - ŵ| but the error of the product, tr((w - ŵ)·G·(w - ŵ)ᵀ) with the Gram
matrix G = xᵀ·x of what the weight is multiplied by. (Frantar et al. 2022, arXiv:2210.17323; the
columns keep their order, because groups that share a scale are contiguous.)
"""

from __future__ import annotations

import math

import torch

from .microscaling import block_exponents, encode_at, nearest, scaled

# Added to the diagonal of the Gram matrix, as a share of its mean. Ten times the usual hundredth:
# an expert sees a few of the tokens of a text, and what those leave open must not be fitted.
DAMPING = 0.1


def inverse_factor(gram: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """The upper triangular U, f32, with Uᵀ·U = (gram + damping · mean of its diagonal)⁻¹.

    ValueError for a Gram matrix that is not finite, or is zero.
    """
    damped = gram.double()
    extra = float(damped.diagonal().mean()) * damping
    if not 0 < extra < math.inf:
        raise ValueError(f"expected a finite Gram matrix that is not zero, its mean is {extra}")
    damped = damped + extra * torch.eye(len(damped), dtype=torch.float64)
    # With J, which reverses rows and columns, and J·A·J = L·Lᵀ: A⁻¹ = (J·L⁻¹·J)ᵀ·(J·L⁻¹·J), and
    # J·L⁻¹·J is upper triangular.
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    eye = torch.eye(len(damped), dtype=torch.float64)
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float()


def gptq(
    w: torch.Tensor, factor: torch.Tensor, group: int = 32, scale: str = "mse"
) -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, K], `inverse_factor` of the Gram matrix [K, K] of its inputs -> codes u8 [N, K/2],
    scales u8 [N, K/group].

    `scale` is a rule of microscaling; "mse" takes, of two scales, the one that costs less in the
    product. ValueError for weights that are not finite.
    """
    columns = w.float().T.contiguous()
    exponents: list[torch.Tensor] = []
    for start in range(0, len(columns), group):
        end = start + group
        block = columns[start:end]
        choices = _scale_choices(block, scale)
        taken, errors, cost = _rounded_block(block, choices, factor[start:end, start:end])
        best = cost.argmin(0)
        rows = torch.arange(len(w))
        exponents.append(choices[best, rows])
        columns[start:end] = taken[best, :, rows].T
        # What is lost in a column is made good by all that follow: w_j -= U_ij · (w_i - ŵ_i) / U_ii
        columns[end:].addmm_(factor[start:end, end:].T, errors[best, :, rows].T, alpha=-1)
    return encode_at(columns.T, torch.stack(exponents, 1))


def toward_exact(w: torch.Tensor, cross: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`w` [N, K] moved so that x̂·wᵀ is nearer to x·wᵀ, where x̂ came through rounded weights.

    `cross` is (x - x̂)ᵀ·x̂ [K, K], `factor` the `inverse_factor` of x̂ᵀ·x̂. Half of the way is gone:
    all of it fits the calibration text. (GPTAQ, Li et al. 2025, arXiv:2504.02692; QEP, Arai &
    Ichikawa 2025, arXiv:2504.09629.)
    """
    # |x·wᵀ - x̂·vᵀ|² is least for v = w·xᵀ·x̂·(x̂ᵀ·x̂)⁻¹ == w + w·(x - x̂)ᵀ·x̂·(x̂ᵀ·x̂)⁻¹
    return w + 0.5 * (w @ cross) @ factor.T @ factor


def _scale_choices(block: torch.Tensor, scale: str) -> torch.Tensor:
    """Exponents [choices, N] for the columns [group, N] of a block, as they now are."""
    if scale != "mse":
        return block_exponents(block.T, scale)[None]
    floor = block_exponents(block.T, "floor")
    return torch.stack((floor, (floor + 1).clamp(max=127)))


def _rounded_block(
    block: torch.Tensor, exponents: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[group, N] at each of the scales [choices, N]: numbers and errors / U_ii [choices, group, N],
    and their cost [choices, N] in the error of the product, once later columns make it good, in
    units of the first scale's square.
    """
    # In units of the scales, which are powers of two: nothing is rounded by that.
    left = scaled(block.expand(len(exponents), *block.shape), -exponents[:, None])
    errors = torch.empty_like(left)
    for i in range(len(block)):
        column = left[:, i]
        taken = nearest(column)
        errors[:, i] = (column - taken) / factor[i, i]
        left[:, i + 1 :] -= factor[i, i + 1 :, None] * errors[:, i, None]
        left[:, i] = taken
    cost = errors.square().sum(1) * 4.0 ** (exponents - exponents[0])
    left, errors = (scaled(x, exponents[:, None]) for x in (left, errors))
    return left, errors, cost
