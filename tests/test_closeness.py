"""The bound of all numeric tests: what it lets pass and what it catches; and the kernels that they are run with."""

import closeness
import kernels
import pytest
import torch


EXPECTED = torch.tensor([[8.0, -4.0], [1e-6, 0.0]])
BOUND = 8.0 * closeness.SHARE


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_every_element_has_the_bound_of_the_largest(place: tuple[int, int]) -> None:
    found = EXPECTED.clone()
    found[place] += 0.5 * BOUND
    closeness.assert_close(found, EXPECTED)
    found[place] += 2 * BOUND
    with pytest.raises(AssertionError, match=r"of the largest element; .* is allowed"):
        closeness.assert_close(found, EXPECTED)
    closeness.assert_close(found, EXPECTED, share=1e-3)


@pytest.mark.parametrize(
    "found",
    [
        torch.full((2, 2), torch.nan),
        torch.tensor([[8.0, -4.0], [torch.inf, 0.0]]),
        EXPECTED.double(),
        EXPECTED.flatten(),
        torch.zeros(2, 2),
    ],
    ids=["nan", "inf", "dtype", "shape", "nought"],
)
def test_what_is_not_near_is_told(found: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        closeness.assert_close(found, EXPECTED)


@pytest.mark.parametrize("expected", [torch.zeros(3), torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf])])
def test_a_comparison_that_could_not_fail_is_refused(expected: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        closeness.assert_close(expected.clone(), expected)


def test_deviations_of_nought() -> None:
    assert closeness.deviation(torch.zeros(2), torch.zeros(2)) == 0
    assert closeness.deviation(torch.ones(2), torch.zeros(2)) == float("inf")


def test_kernels_are_tried_that_the_processor_has() -> None:
    everything, older = kernels.combinations("AVX512"), kernels.combinations("AVX2")
    assert {threads for _, threads in older} == {1, 2, 4} and ("oldest", 4) in older
    assert {kernel for kernel, _ in everything} - {kernel for kernel, _ in older} == {"avx512"}
    assert kernels.settings("avx2", 4)["ATEN_CPU_CAPABILITY"] == "avx2"
    assert kernels.settings("four cores", 1)["OMP_NUM_THREADS"] == "4"


def test_numeric_tests_are_found_by_what_they_compare() -> None:
    names = {path.rpartition("/")[2] for path in kernels.numeric_tests()}
    assert {"test_answers.py", "test_parity.py", "test_ranks.py"} <= names and "test_cli.py" not in names
