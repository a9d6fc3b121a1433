"""FUSED_MLP's kernel in Triton's interpreter, which needs no GPU, against float64.

    TRITON_INTERPRET=1 python tests/support/fused_mlp_values.py [FOLDER]      of the train_gpt.py to try

Prints the largest relative error for each type; exit code 1 if one is too large. The interpreter multiplies
bfloat16 wrongly (Triton 3.7.1), so that float16 stands in for it: the kernel is the same.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
sys.path[:0] = sys.argv[1:2]
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import train_gpt  # noqa: E402

LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3}
# Rows, width, hidden: less than a tile, more than one each way, and no multiples of it.
SHAPES = ((5, 16, 24), (200, 72, 150))
SLOPES = (0.0, 0.5)  # relu2, leaky_relu2


def errors(shape: tuple[int, int, int], slope: float, dtype: torch.dtype) -> list[float]:
    """Relative errors of output and gradients of x, fc, proj."""
    rows, width, hidden = shape
    generator = torch.Generator().manual_seed(rows)
    made = []
    for size in ((rows, width), (width, hidden), (width, hidden), (rows, width)):
        made.append(torch.randn(size, generator=generator).to(dtype))
    weights = [tensor.requires_grad_() for tensor in made[:3]]
    y = train_gpt.SquaredMLP.apply(*weights, slope)
    found = [y, *torch.autograd.grad(y, weights, made[3])]
    x, fc, proj = (tensor.detach().double().requires_grad_() for tensor in weights)
    exact_y = F.leaky_relu(x @ fc, slope).square() @ proj.T
    exact = [exact_y, *torch.autograd.grad(exact_y, (x, fc, proj), made[3].double())]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


def main() -> int:
    code = 0
    for dtype, limit in LIMITS.items():
        worst = max(error for shape in SHAPES for slope in SLOPES for error in errors(shape, slope, dtype))
        print(f"fused_mlp {dtype}: {worst:.1e} of {limit:.0e} allowed")
        if not worst <= limit:
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
