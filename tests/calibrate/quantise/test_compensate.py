"""Passing on rounding errors against its definition, column by column in double precision, and what it is good for."""

import numpy as np
import pytest
import torch

from calibrate.quantise import compensate
from calibrate.quantise.compensate import compensate_matrix, inverse_factor
from calibrate.quantise.rounding import Rounded, round_matrix

GROUP = 16


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(count: int, width: int) -> torch.Tensor:
    return drawn(count, width, seed=1) @ (0.3 * drawn(width, width, seed=2) + torch.eye(width))


def compensated(weight: torch.Tensor, rows: torch.Tensor, *, symmetric: bool) -> Rounded:
    parts = [rows[:, columns] for columns in compensate.spans(weight.shape[1], GROUP)]
    factors = [inverse_factor(part.T @ part, len(rows)) for part in parts]
    return compensate_matrix(weight, factors, GROUP, symmetric=symmetric, dtype=torch.float16)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_passed_on_is_the_least_squares_answer_of_the_columns_that_are_left(symmetric: bool) -> None:
    """Each column's error is answered by the columns after it as a least squares solver answers it.

    The first group's range is that of the weights as they are, so its codes are checked one by one.
    """
    weight, rows = drawn(3, 32), correlated(200, 32)
    gram = (rows.T @ rows).double()
    gram += 32 / 200 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    result = compensated(weight, rows, symmetric=symmetric)
    roots = torch.linalg.cholesky(gram).T.numpy()  # |R d| is the damped error of the outputs
    for row in range(3):
        left = weight[row].double().numpy().copy()
        for column in range(GROUP):
            scale, zero = float(result.scales[row, 0]), float(result.zeros[row, 0])
            code = np.clip(np.rint(left[column] / scale) + zero, 0, 15)
            assert int(result.codes[row, column]) == code
            error = left[column] - (code - zero) * scale
            change = np.linalg.lstsq(roots[:, column + 1 :], roots[:, column] * error, rcond=None)[0]
            left[column + 1 :] += change


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("span", "share"), [(4096, 0.75), (32, 0.9)], ids=["whole", "narrow spans gain less"])
def test_the_outputs_are_nearer_than_those_of_rounding(
    symmetric: bool, span: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compensate, "SPAN", span)
    weight, rows, others = drawn(24, 80), *correlated(1200, 80).split(600)
    made = compensated(weight, rows, symmetric=symmetric)
    plain = round_matrix(weight, GROUP, symmetric=symmetric, dtype=torch.float16)
    errors = [float((others @ (one.numbers() - weight).T).square().sum()) for one in (made, plain)]
    assert errors[0] < share * errors[1], "on rows that were not seen"
    assert made.codes.shape == (24, 80) and made.scales.shape == made.zeros.shape == (24, 5)


def test_few_rows_leave_other_directions_nearly_as_rounding_does() -> None:
    """20 rows of 80 columns: inputs of other directions are no further off than chance and rounding explain."""
    weight, rows, others = drawn(24, 80), correlated(20, 80), drawn(600, 80, seed=5)
    plain = round_matrix(weight, GROUP, symmetric=False, dtype=torch.float16)
    made = compensated(weight, rows, symmetric=False)
    seen, unseen = (
        [float((inputs @ (one.numbers() - weight).T).square().sum()) for one in (made, plain)]
        for inputs in (rows, others)
    )
    assert seen[0] < 0.8 * seen[1]
    assert unseen[0] < 1.3 * unseen[1]


def test_inputs_that_say_nothing_leave_rounding() -> None:
    """Silent columns, and no rows at all: nothing can be passed on, so codes are the nearest."""
    weight = drawn(4, 32)
    plain = round_matrix(weight, GROUP, symmetric=False, dtype=torch.float16)
    nothing = compensated(weight, torch.zeros(5, 32), symmetric=False)
    assert torch.equal(nothing.codes, plain.codes) and torch.equal(nothing.scales, plain.scales)
    one_row = compensated(weight, drawn(1, 32), symmetric=False)
    assert torch.isfinite(one_row.numbers()).all()
