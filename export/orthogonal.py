"""Random orthogonal matrices: a Hadamard matrix with random signs where the order allows, else one by QR. No models.

The entries of a Hadamard matrix are all of one size, so int8 holds them but for the rounding of one scale.
"""

from math import isqrt, sqrt

import torch
from torch import Tensor


def random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """float64 [order, order], the same for the same state of the generator.

    Randomized Hadamard as in QuaRot (Ashkboos et al., 2024); else the Q of a Gaussian matrix, with the signs that make
    it uniform (Mezzadri, "How to generate random matrices from the classical compact groups", 2007).
    """
    matrix = hadamard(order)
    if matrix is None:
        q, r = torch.linalg.qr(torch.randn(order, order, dtype=torch.float64, generator=generator))
        signed: Tensor = q * r.diagonal().sign()
        return signed
    signs = 2 * torch.randint(0, 2, (order,), generator=generator) - 1
    return matrix * signs / sqrt(order)


def hadamard(order: int) -> Tensor | None:
    """±1, float64 [order, order], rows orthogonal; None where Sylvester's and Paley's constructions give none."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    half = hadamard(order // 2) if order % 2 == 0 else None
    if half is not None:
        return torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), half)
    return paley(order)


def paley(order: int) -> Tensor | None:
    """Paley's two constructions ("On orthogonal matrices", 1933) from a prime q: order q + 1 or 2 (q + 1)."""
    if is_prime(q := order - 1) and q % 4 == 3:
        return torch.eye(order, dtype=torch.float64) + bordered(q, below=-1)
    if order % 2 == 0 and is_prime(q := order // 2 - 1) and q % 4 == 1:
        twice, once = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
        return torch.kron(bordered(q, below=1), twice) + torch.kron(torch.eye(q + 1, dtype=torch.float64), once)
    return None


def bordered(q: int, *, below: int) -> Tensor:
    """[q + 1, q + 1]: whether i − j is a square modulo q (±1, 0 on the diagonal), a row of 1 and a column `below`."""
    residues = torch.full((q,), -1, dtype=torch.float64)
    residues[torch.arange(1, q).square() % q] = 1
    residues[0] = 0
    index = torch.arange(q)
    out = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    out[0, 1:], out[1:, 0] = 1, below
    out[1:, 1:] = residues[(index[:, None] - index) % q]
    return out


def is_prime(n: int) -> bool:
    """By trial division."""
    return n > 1 and all(n % divisor for divisor in range(2, isqrt(n) + 1))
