"""The benchmark of the best learning rate by width."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_transfer
from benchmarks.bench_transfer import HOW, best_rate, tables_of_all

pytestmark = pytest.mark.numbers

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("exponent", [-5.3, -4.0, -3.6])
def test_the_minimum_of_a_parabola(exponent):
    powers = np.arange(-8.0, 1.0)
    losses = np.exp(0.1 * (powers - exponent) ** 2)[:, None] * np.array([[0.5, 2.0]])
    np.testing.assert_allclose(best_rate(2**powers, losses), 2**exponent, rtol=1e-12)


def test_no_minimum_at_an_end_of_the_grid():
    powers = np.arange(-8.0, 1.0)
    assert np.isnan(best_rate(2**powers, np.exp(powers)[:, None]))
    diverged = np.where(powers > -7, np.inf, 1.0)[:, None]
    assert np.isnan(best_rate(2**powers, diverged))


def test_the_tables_of_the_guide_are_those_of_the_results():
    tables = {table.name: table for table in tables_of_all(*bench_transfer.read(bench_transfer.RESULTS))}
    rows = re.findall(r"^\| (perceptron|transformer), (?:with `)?(\w+)`? \| (.*) \|$", guide(), re.MULTILINE)
    assert len(rows) == 8
    for i, (model, how, cells) in enumerate(rows):
        name = {"perceptron": "transfer-digits", "transformer": "transfer-characters"}[model] + "-cost" * (i >= 4)
        (row,) = [row for row in tables[name].rows if row[0] == HOW[how == "without"]]
        assert [f"{x:.2f}" for x in row[2:]] == re.findall(r"[0-9.]+", cells)


def guide():
    return (ROOT / ".docs/guides/small_to_large.md").read_text()


def test_with_transfer_the_best_rate_stays_and_without_it_does_not():
    for table in tables_of_all(*bench_transfer.read(bench_transfer.RESULTS)):
        if table.name in ("transfer-digits", "transfer-characters"):
            kept, lost = (np.array(row[1:]) for row in table.rows)
            assert (np.abs(np.log(kept)) < np.log(1.5)).all()
            assert (np.abs(np.log(lost[1:])) > np.log(1.5)).all()
