"""The tables of muP and CompleteP: what becomes of the hyperparameters of a parameter as a model grows."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from adamjax.scaling import _batch

Kind = Literal["hidden", "input", "output", "vector", "fixed"]

OUTPUTS: tuple[str, ...] = ("rate", "multiplier")
DECAYS: tuple[str, ...] = ("product", "sqrt", "fixed")


class Growth(NamedTuple):
    """How a parameter grows: factors of its fan-in and fan-out, and of the number of residual blocks if it is in one.

    A dimension that is the same in both models, such as that of the data, has the factor 1.
    """

    kind: Kind
    fan_in: float = 1.0
    fan_out: float = 1.0
    depth: float = 1.0


class Factors(NamedTuple):
    """Factors from the small model to the large one.

    Fields:
      learning_rate, weight_decay, eps: Of the hyperparameters of Adam.
      init_std: Of the standard deviation of the initial values.
      output: Of the outputs of the layer, in the forward pass.
      residual: Of the output of the residual block that the parameter is in, in the forward pass.
    """

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    init_std: float = 1.0
    output: float = 1.0
    residual: float = 1.0


@dataclass(frozen=True)
class Rules:
    """The choices among published tables; see `adamjax.transfer`."""

    output: str = "rate"
    decay: str = "product"
    alpha: float = 1.0

    def factors(self, growth: Growth) -> Factors:
        """Return the factors of a parameter.

        muP for Adam (Yang et al., 2022) is Table 3 with `output="rate"`, and Table 8 with `output="multiplier"`. The
        powers of the depth are those of CompleteP's Table 1 (Dey et al., 2025), and so is the scaling of eps: each
        number of a gradient shrinks as the layer's output has more of them, and as its block counts for less.
        """
        kind, fan_in, fan_out, depth = growth
        residual = depth**-self.alpha
        rate = depth ** (self.alpha - 1)
        decay, std, output = 1.0, 1.0, 1.0
        eps = residual / fan_out
        if kind == "hidden":
            rate, std = rate / fan_in, fan_in**-0.5
            decay = self._decay(fan_in)
        elif kind == "output" and self.output == "rate":
            rate, std = rate / fan_in, 1 / fan_in
            decay = self._decay(fan_in)
        elif kind == "output":
            output = 1 / fan_in
            eps = eps / fan_in
            decay = self._decay(fan_in) / fan_in  # The same decay per step as without the multiplier.
        return Factors(rate, decay, eps, std, output, residual)

    def _decay(self, fan_in: float) -> float:
        """The factor of the weight decay of a parameter whose learning rate is divided by `fan_in`."""
        return {"product": fan_in, "sqrt": fan_in**0.5, "fixed": 1.0}[self.decay]


def by_kind(width: float, depth: float, run: Factors) -> dict[str, Factors]:
    """Return the factors of each kind of parameter, where all widths grow alike; those of blocks if the depth does.

    `run` has the factors `for_run` of all of them.
    """
    growths = {
        "hidden kernels": Growth("hidden", width, width, depth),
        "biases and norms": Growth("vector", 1.0, width, depth),
    }
    if depth != 1:
        growths = {f"{kind} in blocks": growth for kind, growth in growths.items()}
        growths["norm after the blocks"] = Growth("vector", 1.0, width)
    growths |= {"inputs, embeddings": Growth("input", 1.0, width), "outputs": Growth("output", width)}
    rules = Rules()
    return {kind: product(rules.factors(growth), run) for kind, growth in growths.items()}


def for_run(batch: float, steps: float, data: float | None, batch_rule: str) -> Factors:
    """Return the factors of all parameters, for another batch size, number of steps, and number of examples."""
    rate = _batch.rate_factor(batch, batch_rule)
    data = batch * steps if data is None else data
    return Factors(rate, batch / data / rate, 1 / rate)


def product(a: Factors, b: Factors) -> Factors:
    return Factors(*(x * y for x, y in zip(a, b, strict=True)))
