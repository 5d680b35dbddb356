"""Settings of Adam that suit problems of many kinds, learned by `benchmarks/learn_list.py`."""

from collections.abc import Callable, Sequence

from adamjax.tuning._space import Setting, Space

NAMES = ("learning_rate", "1 - b1", "1 - b2", "weight_decay", "warmup_fraction", "end_fraction")
# The output of `python -m benchmarks.learn_list`: each row is the best addition to those above it.
TABLE: Sequence[tuple[float, ...]] = (
    (0.0637, 0.2, 0.15, 2.3e-05, 0.049, 0),
    (0.186, 0.15, 0.16, 0.0017, 0.25, 5.4e-05),
    (0.0358, 0.4, 0.018, 0.02, 0.012, 0.16),
    (0.924, 0.36, 0.0022, 0.022, 0.018, 0),
    (0.137, 0.41, 0.0059, 0.008, 0.017, 0.0014),
    (0.0517, 0.31, 0.15, 0.3, 0.074, 0.0075),
    (0.344, 0.2, 0.0012, 0.0017, 0.17, 0.25),
    (0.758, 0.29, 0.013, 0.21, 0.045, 0),
    (0.08, 0.47, 0.0067, 0.0011, 0.038, 0.017),
    (0.014, 0.32, 0.21, 0.003, 0.27, 0.44),
    (0.39, 0.58, 0.00059, 0.011, 0.028, 0),
    (0.188, 0.18, 0.05, 0.0048, 0.034, 0.16),
    (0.0253, 0.46, 0.081, 9.5e-05, 0.019, 0),
    (2.66, 0.094, 0.035, 0.00016, 0.17, 0),
    (0.111, 0.32, 0.043, 0.032, 0.053, 0.0062),
    (0.0987, 0.29, 0.1, 0.00084, 0.017, 0),
    (0.255, 0.21, 0.00049, 0.075, 0.2, 0.21),
    (0.0533, 0.028, 0.019, 0.0012, 0.28, 0.19),
    (0.0236, 0.31, 0.0045, 0.00013, 0.039, 0.15),
    (0.194, 0.09, 0.058, 1.3e-05, 0.02, 0),
    (0.044, 0.56, 0.24, 0.0023, 0.032, 0.3),
    (0.27, 0.071, 0.13, 0.66, 0.27, 0.5),
    (0.0347, 0.056, 0.2, 0.26, 0.01, 0),
    (0.00436, 0.45, 0.011, 0.98, 0.097, 0.1),
    (0.0684, 0.44, 0.029, 8.3e-05, 0.11, 0.24),
    (0.0541, 0.16, 0.07, 1.4e-05, 0.011, 0.32),
    (0.133, 0.33, 0.0014, 0.0015, 0.067, 0.13),
    (0.0384, 0.33, 0.058, 0.0004, 0.09, 0),
    (1.71, 0.072, 0.0026, 0.1, 0.019, 0),
    (0.0502, 0.18, 0.0019, 0.034, 0.044, 6.9e-05),
    (0.0341, 0.5, 0.001, 0.00017, 0.061, 0.032),
    (0.132, 0.022, 0.002, 0.27, 0.2, 0),
)


def learned_settings(
    space: Space,
    fill: Sequence[Setting],
    table: Sequence[tuple[float, ...]] = TABLE,
    from_adam: Callable[[Setting], Setting] = dict,
) -> list[Setting]:
    """Return the settings of the list that lie in a space, best first.

    Args:
      space: The space to search.
      fill: Settings of the space, at least as many as the list has; they give the arguments that the list lacks.
      table: The list.
      from_adam: Makes of a setting for Adam one for the optimizer.
    """
    found = []
    for row, other in zip(table, fill, strict=False):
        known = {n.removeprefix("1 - "): 1 - x if n.startswith("1 - ") else x for n, x in zip(NAMES, row, strict=True)}
        names = [name for name in known if name in space.free]
        setting = from_adam(other | {name: known[name] for name in names})
        if all(0 <= space.ranges[name].fraction(setting[name]) <= 1 for name in names):
            found.append(setting | {name: round(setting[name], 12) for name in names})
    return found
