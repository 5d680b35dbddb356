"""Data of supervised problems: what loaders and arrays become."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamjax import problems

RNG = np.random.default_rng(0)
X = np.arange(40.0).reshape(20, 2)  # row i is (2 i, 2 i + 1)
Y = np.arange(20)


def init(key):
    return {"w": jnp.zeros(2)}


def apply(params, inputs):
    return inputs @ params["w"]


def squares(outputs, targets):
    return (outputs - targets.astype(outputs.dtype)) ** 2


def problem_of(train, valid=(X, Y), **arguments):
    return problems.supervised((init, apply), **{"loss": squares, "train": train, "valid": valid, **arguments})


def rows(batches, count):
    """The row numbers of the first batches."""
    found = []
    for inputs, targets in itertools.islice(batches, count):
        np.testing.assert_array_equal(inputs[:, 0], 2 * targets)
        assert (inputs.dtype, targets.dtype) == ("float32", "int32")
        found.append(targets.tolist())
    return found


def test_arrays_are_shuffled_each_epoch_by_the_seed():
    problem = problem_of((X, Y), batch_size=6)
    found = rows(problem.batches(5), 9)  # three batches an epoch, and two rows left out
    for epoch in (found[:3], found[3:6], found[6:]):
        assert len(set(itertools.chain(*epoch))) == 18
    assert len({tuple(batch) for batch in found}) == 9
    assert rows(problem.batches(5), 9) == found != rows(problem.batches(-6), 9)
    for start in (1, 3, 7):
        assert rows(problem.batches(5, start=start), 2) == found[start : start + 2]


def test_processes_share_a_batch(monkeypatch):
    problem = problem_of((X, Y), batch_size=6)
    (whole,) = rows(problem.batches(0), 1)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    parts = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts += rows(problem.batches(0), 1)
    assert [len(part) for part in parts] == [2, 2, 2]
    assert sorted(itertools.chain(*parts)) == sorted(whole)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="batch_size value: 6; it must be a multiple of the number of processes, 4"):
        next(problem.batches(0))


def test_inputs_may_be_a_tree():
    tree = {"left": X.tolist(), "right": (jnp.asarray(X[:, 1]), Y > 3)}
    problem = problems.supervised(
        (init, lambda params, inputs: inputs["left"] @ params["w"] + inputs["right"][0]),
        loss=squares,
        train=(tree, Y),
        valid=(tree, Y),
        batch_size=4,
    )
    inputs, targets = next(problem.batches(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), inputs) == {
        "left": ((4, 2), "float32"),
        "right": (((4,), "float32"), ((4,), "bool")),
    }
    np.testing.assert_array_equal(inputs["right"][1], targets > 3)
    assert problem.evaluate({"w": jnp.zeros(2)})["loss"] == np.mean((X[:, 1] - Y) ** 2)


def slices(size, order=slice(None)):
    x, y = X[order], Y[order]
    return [(x[i : i + size], y[i : i + size]) for i in range(0, 20, size)]


def shuffled(seed):
    yield from slices(6, np.random.default_rng(seed).permutation(20))


class Reshuffling:
    """In another order at each pass, as a DataLoader is."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __iter__(self):
        return iter(slices(6, self.rng.permutation(20)))


class TensorFlowLike:
    def __iter__(self):
        raise AssertionError("these are tensors")

    def as_numpy_iterator(self):
        return iter(slices(6))


PLAIN = [list(range(6)), list(range(6, 12)), list(range(12, 18))]


@pytest.mark.parametrize("loader", [slices(6), TensorFlowLike(), lambda seed: slices(6), lambda seed: iter(slices(6))])
def test_a_loader_is_taken_again_at_its_end_without_its_short_last_batch(loader):
    problem = problem_of(loader)
    assert rows(problem.batches(0), 7) == [*PLAIN, *PLAIN, PLAIN[0]]
    assert rows(problem.batches(0, start=4), 2) == PLAIN[1:]


def test_a_function_of_the_seed():
    for loader in (shuffled, Reshuffling):
        problem = problem_of(loader)
        assert rows(problem.batches(1), 6) == rows(problem.batches(1), 6) != rows(problem.batches(2), 6)
    epochs = rows(problem.batches(1), 6)
    assert epochs[:3] != epochs[3:]


def test_batches_may_be_dicts():
    named = [{"image": x, "label": y} for x, y in slices(5)]
    assert rows(problem_of(named).batches(0), 1) == [[0, 1, 2, 3, 4]]
    assert rows(problem_of({"image": X, "label": Y}, batch_size=5).batches(0), 4)
    tokens = [{"ids": y, "mask": y > 3, "labels": y} for _, y in slices(5)]
    inputs, targets = next(problem_of(tokens).batches(0))
    assert inputs.keys() == {"ids", "mask"}
    np.testing.assert_array_equal(targets, inputs["ids"])


def test_all_rows_of_a_validation_loader_are_measured():
    expected = np.mean(np.square(X @ np.ones(2) - Y))
    for valid in (slices(6), lambda seed: shuffled(seed), (X, Y)):
        metrics = problem_of(slices(5), valid).evaluate({"w": jnp.ones(2)})
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


def test_a_loader_is_read_once_a_batch():
    read = []

    def counted(seed):
        for i, batch in enumerate(slices(5)):
            read.append((seed, i))
            yield batch

    problem = problem_of(counted)
    assert read == []
    rows(problem.batches(3), 3)
    assert read == [(3, 0), (3, 1), (3, 2)]


def test_errors_of_a_loader_are_its_own():
    def failing(seed):
        yield from slices(5)[:2]
        raise OSError("the disk is gone")

    batches = problem_of(failing).batches(0)
    assert rows(batches, 2)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (
            slices(6)[::-1],
            ValueError,
            r"a batch of train is float32\[6,2\], int32\[6\], and the first was float32\[2,2\]",
        ),
        ([*slices(6), *slices(6)], ValueError, r"a batch of train is float32\[2,2\].* only the last of an epoch"),
        ([(X, Y), (X[:, :1], Y)], ValueError, r"a batch of train is float32\[20,1\], int32\[20\], and the first"),
        ([], ValueError, "^train had no batch in an epoch"),
        ([X, Y], TypeError, "^a batch of train is of type ndarray, expected a pair"),
        ([(X, Y, Y)], TypeError, "^a batch of train is of type tuple and length 3, expected a pair"),
        ([{"a": X, "b": Y}], TypeError, r"^a batch of train is a dict of \['a', 'b'\]; the targets must be under"),
        (
            [(X, Y[:5])],
            ValueError,
            r"the arrays of a batch of train are float32\[20,2\], int32\[5\]: .* same number of rows",
        ),
        ([(["a", "b"], [0, 1])], TypeError, "^the inputs of a batch of train are <U1, expected numbers"),
        (lambda seed: 3, TypeError, "^train returned int for seed 0, expected an iterable of batches"),
    ],
)
def test_bad_batches(loader, error, message):
    with pytest.raises(error, match=message):
        list(itertools.islice(problem_of(loader).batches(0), 9))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"train": iter(slices(6))},
            TypeError,
            "^Invalid train value: a value of type list_iterator, .* give a function",
        ),
        ({"train": shuffled(0)}, TypeError, "^Invalid train value: a value of type generator"),
        ({"train": X}, TypeError, r"^Invalid train value: a value of type ndarray; train must be a tuple of arrays"),
        ({"train": 3}, TypeError, "^Invalid train value: a value of type int"),
        ({"train": (X, Y, Y)}, TypeError, "^train is of type tuple and length 3, expected a pair"),
        ({"train": (X, Y[:5])}, ValueError, r"^the arrays of train are float32\[20,2\], int32\[5\]"),
        ({"valid": (X[:0], Y[:0])}, ValueError, r"^the arrays of valid are float32\[0,2\]"),
        ({"valid": [], "batch_size": 5}, ValueError, "^valid had no batch"),
        ({"valid": None}, TypeError, "^Invalid valid value: a value of type NoneType"),
        (
            {"train": slices(6), "valid": slices(6), "batch_size": 6},
            ValueError,
            "^Invalid batch_size value: 6; leave it out, the loaders have their own",
        ),
    ],
)
def test_bad_data(arguments, error, message):
    with pytest.raises(error, match=message):
        problem_of(**{"train": (X, Y), **arguments})


def test_a_torch_data_loader():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(X, requires_grad=True), torch.tensor(Y))

    def loader(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.utils.data.DataLoader(data, batch_size=6, shuffle=True, generator=generator)

    problem = problem_of(loader, torch.utils.data.DataLoader(data, batch_size=6))
    found = rows(problem.batches(1), 6)
    assert rows(problem.batches(1), 6) == found != rows(problem.batches(2), 6)
    assert found[:3] != found[3:]
    assert problem.evaluate({"w": jnp.zeros(2)})["loss"] == np.mean(Y**2)
    assert repr(problem) == (
        "supervised((init, apply), loss=squares, train=<batches of test_a_torch_data_loader.<locals>.loader>, "
        "valid=[float32[20,2], int32[20]], metrics={})"
    )


def test_a_grain_dataset():
    grain = pytest.importorskip("grain")
    source = grain.MapDataset.source([(x, y) for x, y in zip(X, Y, strict=True)])

    def loader(seed):
        return source.shuffle(seed=seed).batch(6)

    problem = problem_of(loader, source.batch(6))
    found = rows(problem.batches(1), 6)
    assert rows(problem.batches(1), 6) == found != rows(problem.batches(2), 6)
    assert problem.evaluate({"w": jnp.zeros(2)})["loss"] == np.mean(Y**2)
    assert rows(problem_of(source.batch(6).to_iter_dataset()).batches(0), 4) == [*PLAIN, PLAIN[0]]


def test_a_tensorflow_dataset():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    problem = problem_of(lambda seed: data.shuffle(20, seed=seed).batch(6), data.batch(6))
    found = rows(problem.batches(1), 6)
    assert rows(problem.batches(1), 6) == found != rows(problem.batches(2), 6)
    assert problem.evaluate({"w": jnp.zeros(2)})["loss"] == np.mean(Y**2)
