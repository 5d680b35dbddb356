"""The coordinate check: whether activations change alike at every width."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import checks, trees
from adamjax._core.figures import label_log_axes, shades, styled, subplots
from adamjax._core.text import drawable
from adamjax._core.typing import PyTree
from adamjax._transforms.base import as_transformation

Loss = Callable[[PyTree], tuple[Any, PyTree]]  # from the parameters to the loss and the activations
Make = Callable[[int, int], tuple[PyTree, Loss, Any]]  # from width and seed to parameters, loss and optimizer


@dataclasses.dataclass(frozen=True, eq=False)
class CoordinateCheck:
    """The result of `coordinate_check`.

    Fields:
      widths: int[widths].
      layers: The paths of the activations.
      changes: float[layers, widths, steps], the mean absolute change of an activation since initialization, after each
        update, averaged over the seeds.
      tolerance: The largest slope, positive or negative, that passes.
    """

    widths: np.ndarray
    layers: list[str]
    changes: np.ndarray
    tolerance: float

    @property
    def slopes(self) -> dict[str, float]:
        """For each layer, the power of the width in the change after the last update: 0 if all widths change alike.

        NaN if an activation did not change, or is not finite.
        """
        return {layer: self._slope(change[:, -1]) for layer, change in zip(self.layers, self.changes, strict=True)}

    @property
    def passed(self) -> bool:
        """Whether no slope exceeds the tolerance."""
        return all(abs(slope) <= self.tolerance for slope in self.slopes.values())

    def _slope(self, change: np.ndarray) -> float:
        if not (np.isfinite(change) & (change > 0)).all():
            return float("nan")
        return float(np.polyfit(np.log(self.widths), np.log(change), 1)[0])

    def __str__(self) -> str:
        head = ["layer", *(f"width {width}" for width in self.widths), "slope", ""]
        rows = [head]
        for (layer, slope), change in zip(self.slopes.items(), self.changes, strict=True):
            verdict = "passes" if abs(slope) <= self.tolerance else "grows" if slope > 0 else "vanishes"
            verdict = verdict if np.isfinite(slope) else "does not change, or is not finite"
            rows.append([layer, *(f"{x:.3g}" for x in change[:, -1]), f"{slope:.2f}", verdict])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    @styled("demo", "drawing a coordinate check")
    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Plot the change of each activation over the width, with a line for each update.

        Args:
          path: The file to write, such as "coordinates.png". None: only return the figure.

        Returns:
          The matplotlib figure.

        Raises:
          ImportError: matplotlib is not installed.
        """
        count, steps = len(self.layers), self.changes.shape[2]
        rows, columns = -(-count // 4), min(count, 4)
        figure, panels = subplots((3.2 * columns, 2.9 * rows + 0.4), rows, columns, sharey=True)
        axes = panels.flat
        for axis, (layer, slope), change in zip(axes, self.slopes.items(), self.changes, strict=False):
            for step, color in enumerate(shades(steps)):
                label = f"after {step + 1} update{'s' * (step > 0)}" if step in (0, steps - 1) else None
                axis.plot(self.widths, change[:, step], marker="o", markersize=3, color=color, label=label)
            axis.set(xscale="log", yscale="log", title=drawable(f"{layer}: slope {slope:.2f}"), xlabel="width")
            label_log_axes(axis)
            axis.set_xticks(self.widths, [str(width) for width in self.widths])
            axis.minorticks_off()
        for axis in list(axes):
            axis.set_axis_off()
        figure.axes[0].set_ylabel("mean change of an activation")
        figure.axes[0].legend(fontsize="small")
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def coordinate_check(
    make: Make, *, widths: Sequence[int], steps: int = 4, seeds: int = 4, tolerance: float = 0.25
) -> CoordinateCheck:
    """Measure whether activations change alike at every width, in the first updates (Yang et al., 2022, appendix D.1).

    They do where hyperparameters, initial values and outputs follow the maximal update parameterization, as
    `adamjax.transfer` gives them. Activations that change more in wider models blow up in a large one, and those that
    change less learn nothing there. A factor that an implementation forgets shows as such a slope.

    Args:
      make: Called with a width and a seed, returns the parameters, a function from parameters to the loss and the
        activations (a tree of arrays, one for each layer), and the optimizer. The loss is that of one fixed batch.
      widths: The widths, at least two; or numbers of residual blocks, if `make` takes those. Ends that are far apart
        make slopes certain.
      steps: The number of updates.
      seeds: The number of seeds (0, 1, ...) to average over. Small models differ from seed to seed.
      tolerance: The largest slope, positive or negative, that passes.

    Returns:
      A `CoordinateCheck`; its text is a table, and `plot` draws it.

    Raises:
      ValueError: A number is out of range, or the models of two widths have different activations.
      TypeError: `make` is not such a function.

    References:
      Yang et al., 2022, https://arxiv.org/abs/2203.03466.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> x, y = jnp.linspace(-1, 1, 64).reshape(16, 4), jnp.ones((16, 1))
    >>> def model(width, seed):
    ...     keys = jax.random.split(jax.random.key(seed))
    ...     shapes = {"hidden": (4, width), "head": (width, 1)}
    ...     return {name: jax.random.normal(key, shapes[name]) / 2 for key, name in zip(keys, shapes)}
    >>> def loss(params):
    ...     hidden = jnp.tanh(x @ params["hidden"])
    ...     out = hidden @ params["head"]
    ...     return jnp.mean((out - y) ** 2), {"hidden": hidden, "out": out}
    >>> def make(width, seed):
    ...     small, params = model(16, seed), model(width, seed)
    ...     opt = adamjax.transfer(adamjax.adam(1e-2), small, params)
    ...     return opt.rescale(small, params), loss, opt
    >>> adamjax.diagnostics.coordinate_check(make, widths=[16, 64, 256]).passed
    True
    >>> plain = lambda width, seed: (model(width, seed), loss, adamjax.adam(1e-2))
    >>> adamjax.diagnostics.coordinate_check(plain, widths=[16, 64, 256]).passed
    False
    """
    checks.function("make", make)
    checks.count("steps", steps)
    checks.count("seeds", seeds)
    found_tolerance = float(checks.number("tolerance", tolerance))
    given = list(widths) if isinstance(widths, Sequence | np.ndarray) and not isinstance(widths, str) else [widths]
    for width in given:
        checks.count("widths", width)
    if len(set(given)) < 2:
        raise ValueError(f"Invalid widths value: {checks.shown(widths)}; widths must have at least two numbers")
    layers: list[str] = []
    changes = []
    for width in given:
        runs = [_changes(make(width, seed), steps) for seed in range(seeds)]
        layers = layers or list(runs[0])
        for run in runs:
            if list(run) != layers:
                raise ValueError(
                    f"the activations at width {width} are {checks.listed(run)}, and at width {given[0]} "
                    f"{checks.listed(layers)}: return the same tree at every width"
                )
        changes.append(np.mean([[run[layer] for layer in layers] for run in runs], axis=0))
    return CoordinateCheck(np.asarray(given), layers, np.stack(changes, axis=1), found_tolerance)


def _changes(made: Any, steps: int) -> dict[str, list[float]]:
    """The mean absolute change of each activation after each update."""
    if not (isinstance(made, tuple) and len(made) == 3 and callable(made[1])):
        raise TypeError(f"make returned {checks.shown(made)}, expected (params, loss, opt)")
    params, loss, opt = made
    opt = as_transformation(opt, "the optimizer that make returns")
    _, first = _outputs(loss, params)

    @jax.jit
    def step(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        grads = jax.grad(loss, has_aux=True)(params)[0]
        params, state = opt.step(grads, state, params)
        return params, state, jax.tree.map(lambda a, b: jnp.mean(jnp.abs(a - b)), loss(params)[1], first)

    state, found = opt.init(params), dict[str, list[float]]()
    for _ in range(steps):
        params, state, changes = step(params, state)
        for key, change in jax.tree.leaves_with_path(changes):
            found.setdefault(trees.path_of(key), []).append(float(change))
    return found


def _outputs(loss: Loss, params: PyTree) -> tuple[Any, PyTree]:
    """The loss and the activations, compiled: training compiles them, too."""
    found = jax.jit(loss)(params)
    if not (isinstance(found, tuple) and len(found) == 2 and jax.tree.leaves(found[1])):
        raise TypeError(f"the loss that make returns gave {checks.shown(found)}, expected (loss, activations)")
    return found
