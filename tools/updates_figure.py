""".venv/bin/python tools/updates_figure.py [OUT]       (docs/images/updates.svg)

KL to the teacher while many updates are made on one batch, by exact enumeration: a vocabulary of seven, one token,
method `opd`, ratio_clip 0.2, step 0.1, three random cases. Solid: delta_t of the policy as it is. Dashed: delta_t of
the policy before the first update.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from megatron_sgopd.objective.loss import TokenSignals, coefficients
from megatron_sgopd.objective.methods import METHODS

VOCABULARY, UPDATES, STEP = 7, 1500, 0.1
WIDTH, HEIGHT, MARGIN = 640, 300, 48
LEAST = 1e-7
COLOURS = ("#1f77d0", "#d9660a", "#2a9d5c")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("docs/images/updates.svg"))
    out = parser.parse_args().out
    lines = [_axes()]
    for seed, colour in zip((3, 4, 5), COLOURS, strict=True):
        for frozen in (False, True):
            values = _divergences(seed, frozen)
            print(f"case {seed}, {'frozen' if frozen else 'current'}: KL {values[0]:.5f} -> {values[-1]:.2e}")
            dash = ' stroke-dasharray="5 4"' if frozen else ""
            points = " ".join(f"{_x(i):.1f},{_y(value):.1f}" for i, value in enumerate(values) if i % 10 == 0)
            lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    out.write_text("\n".join([svg, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *lines, "</svg>"]) + "\n")


def _divergences(seed: int, frozen: bool) -> list[float]:
    """KL to the teacher before the first update and after each."""
    generator = torch.Generator().manual_seed(seed)
    teacher_V = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).log_softmax(0)
    noise_V = 0.15 * torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    old_V = (teacher_V + noise_V).log_softmax(0)
    method, z_V, values = METHODS["opd"], old_V.clone(), []
    for _ in range(UPDATES + 1):
        z_V.requires_grad_()
        s_V = z_V.log_softmax(0)
        values.append(float((s_V.exp() * (s_V - teacher_V)).sum().detach()))
        signals = TokenSignals(
            teacher_logprobs_T=teacher_V - old_V + s_V.detach() if frozen else teacher_V,
            reference_logprobs_T=None,
            behaviour_logprobs_T=old_V,
            outcome_advantage_T=torch.zeros(VOCABULARY, dtype=torch.float64),
            trajectory_T=torch.arange(VOCABULARY),
            mask_T=torch.ones(VOCABULARY, dtype=torch.bool),
            old_logprobs_T=old_V,
        )
        constants_V = coefficients(s_V.detach(), signals, method, 1.0)
        (grad_V,) = torch.autograd.grad(-(old_V.exp() * constants_V * s_V).sum(), z_V)
        z_V = (z_V - STEP * grad_V).detach()
    return values


def _x(update: int) -> float:
    return MARGIN + (WIDTH - MARGIN - 12) * update / UPDATES


def _y(value: float) -> float:
    decades = math.log10(0.1 / LEAST)
    return 12 + (HEIGHT - MARGIN - 12) * (math.log10(0.1) - math.log10(max(value, LEAST))) / decades


def _axes() -> str:
    parts = [
        f'<line x1="{MARGIN}" x2="{WIDTH - 12}" y1="{_y(10.0**p):.1f}" y2="{_y(10.0**p):.1f}" stroke="#d0d7de"/>'
        f'<text x="{MARGIN - 6}" y="{_y(10.0**p) + 4:.1f}" text-anchor="end">1e{p}</text>'
        for p in range(-7, 0)
    ]
    parts += [
        f'<text x="{_x(update):.1f}" y="{HEIGHT - 26}" text-anchor="middle">{update}</text>'
        for update in (0, 500, 1000, 1500)
    ]
    parts.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">updates on one batch: KL to the teacher, delta '
        "of the policy as it is (solid), of the one before the first update (dashed)</text>"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
