"""The optimizers in long double, from the papers and the PyTorch documentation.

Written for NumPy, one array and one formula at a time, without anything of the package under test.
"""

import math

import numpy as np

LONG = np.longdouble


def long(x):
    x = np.asarray(x)
    return x.astype(np.clongdouble if np.iscomplexobj(x) else LONG)


def run(
    p,
    grads,
    *,
    algorithm="adam",
    learning_rate=1e-3,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    nesterov=False,
    amsgrad=None,
    threshold=5.0,
    coupled=0.0,
    decoupled=0.0,
    independent=0.0,
    maximize=False,
):
    """The parameters after each step. Rates may be functions of the step count from 0."""
    p = long(p)
    b1, b2, eps, eps_root = LONG(b1), LONG(b2), LONG(eps), LONG(eps_root)
    m = np.zeros_like(p)
    v = np.zeros(p.shape, LONG)
    v_max = np.zeros(p.shape, LONG)
    trajectory = []
    for t, gradient in enumerate(grads, start=1):
        lr, l2, wd, iwd = (
            LONG(x(t - 1) if callable(x) else x) for x in (learning_rate, coupled, decoupled, independent)
        )
        g = long(gradient)
        g = (-g if maximize else g) + l2 * p
        m = b1 * m + (1 - b1) * g
        m_hat = m / (1 - b1**t)
        if nesterov:
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        if algorithm == "adamax":
            v = np.maximum(b2 * v, np.abs(g) + eps)
            direction = m_hat / v
        else:
            v = b2 * v + (1 - b2) * np.abs(g) ** 2
            v_hat = v / (1 - b2**t)
            if amsgrad == "torch":
                v_max = np.maximum(v_max, v)
                v_hat = v_max / (1 - b2**t)
            elif amsgrad == "corrected":
                v_max = np.maximum(v_max, v_hat)
                v_hat = v_max
            elif amsgrad == "paper":
                v_max = np.maximum(v_max, v)
                v_hat = v_max
                m_hat = b1 * m + (1 - b1) * g if nesterov else m
            direction = m_hat / (np.sqrt(v_hat + eps_root) + eps)
        if algorithm == "radam":
            rho_inf = 2 / (1 - b2) - 1
            rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
            if rho < threshold:
                direction = m_hat
            else:
                direction = direction * np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        p = p - lr * direction - lr * wd * p - iwd * p
        trajectory.append(p)
    return trajectory


def warmup_cosine(peak, warmup_steps, total_steps, end=0.0):
    def schedule(count):
        if count < warmup_steps:
            return peak * count / warmup_steps
        fraction = min((count - warmup_steps) / (total_steps - warmup_steps), 1)
        return end + (peak - end) * (1 + math.cos(math.pi * fraction)) / 2

    return schedule
