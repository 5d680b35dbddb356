"""Runs of torch.optim that ours are compared with: the cases, and what they are fed.

`python tests/golden/cases.py` writes them to torch.npz; the one committed is of torch 2.13.0.
"""

from pathlib import Path

import numpy as np

SHAPE, STEPS, HALF = (4, 3), 60, 30
# The gradient of these steps is None: the parameter is left out, and falls behind in its count.
SKIPPED = (5, 6, 40)

CASES = {
    "adam": ("adam", {}),
    "adam amsgrad": ("adam", {"lr": 1e-2, "amsgrad": True}),
    "adam coupled": ("adam", {"lr": 1e-2, "weight_decay": 0.1}),
    "adam coupled maximize": ("adam", {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}),
    "adam decoupled amsgrad": ("adam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "amsgrad": True}),
    "adam betas eps": ("adam", {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-4}),
    "adamw": ("adamw", {}),
    "adamw amsgrad maximize": ("adamw", {"lr": 1e-2, "weight_decay": 0.3, "amsgrad": True, "maximize": True}),
    "nadam": ("nadam", {}),
    "nadam momentum_decay": ("nadam", {"lr": 1e-2, "momentum_decay": 6e-3, "weight_decay": 0.1}),
    "nadam decoupled": ("nadam", {"weight_decay": 0.9, "decoupled_weight_decay": True, "maximize": True}),
    "radam": ("radam", {"lr": 1e-2}),
    "radam coupled": ("radam", {"lr": 1e-2, "weight_decay": 0.1}),
    "radam decoupled eps": ("radam", {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-3}),
    "radam short": ("radam", {"lr": 1e-2, "betas": (0.9, 0.95), "maximize": True}),
    "adamax": ("adamax", {}),
    "adamax coupled maximize": ("adamax", {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}),
}
DTYPES = ("float32", "float64", "complex64", "complex128")
CLASSES = {"adam": "Adam", "adamw": "AdamW", "nadam": "NAdam", "radam": "RAdam", "adamax": "Adamax"}


def draw(rng, dtype, decades):
    """Numbers of either sign over some decades around 1."""

    def real():
        return rng.choice([-1, 1], SHAPE) * 10.0 ** rng.uniform(-decades, decades, SHAPE)

    return (real() + 1j * real() if dtype.startswith("complex") else real()).astype(dtype)


def start(dtype):
    return draw(np.random.default_rng(0), dtype, 0.5)


def gradients(dtype):
    """One for each step; None where it is skipped."""
    rng = np.random.default_rng(1)
    drawn = [draw(rng, dtype, 2) for _ in range(STEPS)]
    return [None if t in SKIPPED else g for t, g in enumerate(drawn)]


def run_torch(name, dtype):
    """The parameters of torch after each step, and its state after half of them, as NumPy arrays."""
    import torch

    make, arguments = CASES[name]
    p = torch.nn.Parameter(torch.tensor(start(dtype)))
    opt = getattr(torch.optim, CLASSES[make])([p], **arguments)
    course, half = [], {}
    for t, g in enumerate(gradients(dtype)):
        if t == HALF:
            half = {key: x.numpy().copy() for key, x in opt.state[p].items()}
        p.grad = None if g is None else torch.tensor(g)
        opt.step()
        course.append(p.detach().numpy().copy())
    return np.stack(course), half


def main():
    arrays = {}
    for name in CASES:
        for dtype in DTYPES:
            course, half = run_torch(name, dtype)
            # Every tenth step is enough to see where two courses part.
            arrays[f"{name}/{dtype}/course"] = course[9::10]
            if dtype == "float32":
                arrays |= {f"{name}/{dtype}/{key}": x for key, x in half.items()}
    np.savez_compressed(Path(__file__).parent / "torch.npz", **arrays)


if __name__ == "__main__":
    main()
