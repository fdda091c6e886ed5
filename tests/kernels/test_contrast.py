"""The tiled contrast is the plain one, exactly differentiated, and never holds the matrix of all pairs."""

from __future__ import annotations

import pytest
import torch
from place.kernels import contrast as module
from place.kernels.contrast import Pairs, contrast
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_ROWS", 3)
    monkeypatch.setattr(module, "TILE_COLUMNS", 4)


def build_inputs(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows)
    features = [torch.randn(size, 5, generator=rng, dtype=dtype).requires_grad_() for size in (rows, columns)]
    return features[0], features[1], torch.tensor(2.5, dtype=dtype, requires_grad=True)


def build_pairs(kind: str, rows: int, columns: int) -> Pairs:
    """Pairs of each kind; the own column of the first row is the last, and whole tiles are left out."""
    rng = torch.Generator().manual_seed(columns)
    own = torch.arange(rows).flip(0) + columns - rows
    keys = torch.randint(0, 4, (columns,), generator=rng)
    mask = torch.arange(columns) >= min(8, columns - 1)
    study = torch.arange(columns) // 2
    return {
        "plain": Pairs(own),
        "positives": Pairs(own, keys[own], keys, equal_is_positive=True),
        "excluded": Pairs(own, keys[own], keys),
        "masked": Pairs(own, keys[own], keys, column_mask_G=mask),
        "study": Pairs(own, keys[own], keys, column_mask_G=mask, row_study_R=study[own], column_study_G=study),
    }[kind]


KINDS = ["plain", "positives", "excluded", "masked", "study"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 13), (6, 8), (5, 16)])
def test_tiles_give_the_loss_and_the_gradients_of_one_piece(kind: str, rows: int, columns: int) -> None:
    results = []
    for method in ("plain", "tiled"):
        inputs = build_inputs(rows, columns)
        loss_R = contrast(*inputs, build_pairs(kind, rows, columns), method)
        weights_R = torch.arange(rows, dtype=torch.float64)  # a weight of 0, as rows without a sentence have
        results.append([loss_R, *torch.autograd.grad((loss_R * weights_R).sum(), inputs)])
    for plain, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["plain", "tiled"])
def test_gradients_are_those_of_finite_differences(kind: str, method: str) -> None:
    pairs = build_pairs(kind, 5, 9)
    assert torch.autograd.gradcheck(lambda *inputs: contrast(*inputs, pairs, method), build_inputs(5, 9))


def test_each_row_is_the_cross_entropy_over_its_own_columns() -> None:
    rows, columns, scale = build_inputs(4, 9)
    keys = torch.tensor([1, 2, 1, 1, 3, 2, 2, 1, 3])
    own = torch.tensor([0, 3, 4, 6])
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1]).bool()
    loss_R = contrast(rows, columns, scale, Pairs(own, keys[own], keys, column_mask_G=mask))
    for row, partner in enumerate(own.tolist()):
        keep = [j for j in range(9) if j == partner or (mask[j] and keys[j] != keys[partner])]
        logits = torch.stack([scale * rows[row] @ columns[j] for j in keep])
        torch.testing.assert_close(loss_R[row], -logits.log_softmax(0)[keep.index(partner)])


@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_float32_in_tiles_errs_at_most_twice_as_much_as_plain(scale: float) -> None:
    rng = torch.Generator().manual_seed(0)
    rows, noise = torch.randn(2, 100, 32, generator=rng, dtype=torch.float64)
    keys = torch.randint(0, 30, (100,), generator=rng)
    pairs = Pairs(torch.arange(100), keys, keys, equal_is_positive=True)
    unit = [torch.nn.functional.normalize(value, dim=1) for value in (rows, rows + noise / 5)]
    results = {}
    for method, dtype in (("exact", torch.float64), ("plain", torch.float32), ("tiled", torch.float32)):
        inputs = [value.to(dtype).requires_grad_() for value in (*unit, torch.tensor(scale))]
        loss = contrast(*inputs, pairs, "tiled" if method == "tiled" else "plain").mean()
        results[method] = [loss, *torch.autograd.grad(loss, inputs)]
    for exact, plain, tiled in zip(*results.values(), strict=True):
        rounding = 1e-7 * exact.norm()
        assert (tiled.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + rounding


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that an operation has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize(("method", "holds_matrix"), [("tiled", False), ("plain", True)])
def test_no_tensor_of_the_tiled_way_is_as_large_as_the_matrix(method: str, holds_matrix: bool) -> None:
    inputs, pairs = build_inputs(60, 60), build_pairs("masked", 60, 60)
    with LargestTensor() as seen:
        contrast(*inputs, pairs, method).sum().backward()
    assert (seen.elements >= 60 * 60) == holds_matrix
    if not holds_matrix:
        assert seen.elements <= 60 * 5


def test_the_way_is_chosen_by_the_number_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for method in module.METHODS:
        monkeypatch.setitem(module.METHODS, method, lambda *_, method=method: taken.append(method))
    monkeypatch.setattr(module, "TILED_FROM_PAIRS", 6 * 8)
    contrast(*build_inputs(6, 7), build_pairs("plain", 6, 7))
    contrast(*build_inputs(6, 8), build_pairs("plain", 6, 8))
    assert taken == ["plain", "tiled"]
