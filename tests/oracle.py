"""The optimizers in long double, from the papers and the PyTorch documentation.

Written for NumPy, one array and one formula at a time, without anything of the package under test.
"""

import math
from typing import Any, NamedTuple

import numpy as np

LONG = np.longdouble


def long(x):
    x = np.asarray(x)
    return x.astype(np.clongdouble if np.iscomplexobj(x) else LONG)


class Memory(NamedTuple):
    """Of the steps so far."""

    t: int
    m: Any
    v: Any
    v_max: Any
    product: Any = LONG(1)  # of the rates of the first moment, in torch's NAdam
    slow: Any = LONG(0)  # the slow mean, in AdEMAMix
    factor: Any = LONG(1)  # of the learning rate in this step, in StableAdamW


def start(p):
    return Memory(0, np.zeros_like(long(p)), np.zeros(np.shape(p), LONG), np.zeros(np.shape(p), LONG))


def direction(
    memory,
    g,
    *,
    algorithm="adam",
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    nesterov=False,
    amsgrad=None,
    threshold=5.0,
    momentum_decay=4e-3,
    cautious_update=False,
    b3=0.9999,
    alpha=5.0,
    a=1.27,
    b=1.0,
):
    """The direction of one more step with the gradient of the objective, and the memory after it.

    An algorithm that ends in " of torch" is that of PyTorch's documentation, where it differs from the paper.
    """
    t, m, v, v_max, product, slow, factor = memory
    b3, alpha = (LONG(x(t) if callable(x) else x) for x in (b3, alpha))
    t = t + 1
    b1, b2, eps, eps_root = LONG(b1), LONG(b2), LONG(eps), LONG(eps_root)
    g = long(g)
    if algorithm == "adopt":  # Taniguchi et al., 2024, Algorithm 2, clipped as their code does
        if t == 1:
            return np.zeros_like(g), memory._replace(t=1, v=np.abs(g) ** 2)
        normalised = g / np.maximum(np.sqrt(v), eps)
        limit = LONG(t - 1) ** LONG(0.25)
        m = b1 * m + (1 - b1) * normalised * np.minimum(1, limit / np.maximum(np.abs(normalised), LONG(1e-30)))
        return m, memory._replace(t=t, m=m, v=b2 * v + (1 - b2) * np.abs(g) ** 2)
    m = b1 * m + (1 - b1) * g
    m_hat = m / (1 - b1**t)
    if nesterov:
        m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    if algorithm == "nadam of torch":
        now, following = (b1 * (1 - LONG(0.96) ** (n * LONG(momentum_decay)) / 2) for n in (t, t + 1))
        product = product * now
        m_hat = following * m / (1 - product * following) + (1 - now) * g / (1 - product)
    if algorithm == "adamax":
        v = np.maximum(b2 * v, np.abs(g) + eps)
        found = m_hat / v
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
        # torch's RAdam adds eps before it corrects the bias.
        denominator = np.sqrt(v_hat + eps_root) + eps / (np.sqrt(1 - b2**t) if algorithm == "radam of torch" else 1)
        found = m_hat / denominator
    if algorithm.startswith("radam"):
        rho_inf = 2 / (1 - b2) - 1
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        if rho <= 5 if algorithm == "radam of torch" else rho < threshold:
            found = m_hat
        else:
            found = found * np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    if algorithm == "ademamix":  # Pagliardini et al., 2024, Algorithm 1
        slow = b3 * slow + (1 - b3) * g
        found = (m_hat + alpha * slow) / denominator
    if algorithm == "simplified ademamix":  # Morwani et al., 2025, Algorithm 3: a sum, not a mean
        found = (m / (1 - b1) + alpha * g) / denominator
    if algorithm == "atan2":  # Everett et al., 2024
        root = LONG(b) * np.sqrt(v_hat)
        found = LONG(a) * np.arctan2(m_hat.real, root)
        if np.iscomplexobj(m_hat):
            found = found + 1j * LONG(a) * np.arctan2(m_hat.imag, root)
    if algorithm == "stable":  # Wortsman et al., 2023, Algorithm 2
        factor = 1 / np.maximum(1, np.sqrt(np.mean(np.abs(g) ** 2 / np.maximum(v_hat, eps**2))))
    if cautious_update:  # Liang et al., 2024, Algorithm 1
        agrees = (found * np.conj(g)).real > 0
        found = found * agrees * (LONG(agrees.size) / (np.sum(agrees) + 1))
    return found, Memory(t, m, v, v_max, product, slow, factor)


def run(
    p,
    grads,
    *,
    learning_rate=1e-3,
    coupled=0.0,
    decoupled=0.0,
    independent=0.0,
    cautious=False,
    maximize=False,
    **rule,
):
    """The parameters after each step. Rates may be functions of the step count from 0.

    Of cautious decay: Chen et al., 2025, Algorithm 1, where the indicator is that of u x >= 0.
    """
    p = long(p)
    memory = start(p)
    trajectory = []
    for t, gradient in enumerate(grads):
        lr, l2, wd, iwd = (LONG(x(t) if callable(x) else x) for x in (learning_rate, coupled, decoupled, independent))
        g = long(gradient)
        g = (-g if maximize else g) + l2 * p
        found, memory = direction(memory, g, **rule)
        lr = lr * memory.factor
        decaying = p
        if cautious and np.iscomplexobj(p):
            decaying = p.real * (found.real * p.real >= 0) + 1j * p.imag * (found.imag * p.imag >= 0)
        elif cautious:
            decaying = p * (found * p >= 0)
        p = p - lr * found - lr * wd * decaying - iwd * decaying
        trajectory.append(p)
    return trajectory


def half_life(init, end, total_steps):
    """A decay rate whose half-life rises linearly (Pagliardini et al., 2024, section 3.2)."""
    first, last = (math.log(0.5) / math.log(b) for b in (init, end))
    return lambda count: 0.5 ** (1 / (first + (last - first) * min(count / total_steps, 1)))


def warmup_cosine(peak, warmup_steps, total_steps, end=0.0):
    def schedule(count):
        if count < warmup_steps:
            return peak * count / warmup_steps
        fraction = min((count - warmup_steps) / (total_steps - warmup_steps), 1)
        return end + (peak - end) * (1 + math.cos(math.pi * fraction)) / 2

    return schedule
