"""How near two computations of the same numbers have to be."""

import torch


# Of the largest element. An operation in float32 is off by up to 6e-8 of its result; with the kernels tried by
# `make test-kernels`, results and gradients of tiny models differ by up to 1.7e-6. The slightest mistake in
# `test_parity_mutations.py`, an epsilon of 1e-6 in the place of 1e-5, moves its tensor by 2.9e-5.
SHARE = 5e-6


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """
    The largest difference of two elements, as a share of the largest element that is expected.

    Kernels add in different orders. What that costs grows with what is added, not with what is left of it: where large
    numbers cancel, an element may be nothing but rounding. So a bound in terms of each element alone (`rtol`) does not
    hold on every processor, and a fixed one (`atol`) says nothing without the size of the numbers.
    """
    difference, largest = (float(each.detach().abs().max()) for each in (found - expected, expected))
    return difference / largest if largest else float("inf") if difference else 0.0


def assert_close(found: torch.Tensor, expected: torch.Tensor, share: float = SHARE) -> None:
    """
    Assert that two tensors of the same shape and dtype, computed in different ways, have the same numbers.

    What computes nothing, such as saving and loading weights, and what repeats a computation, such as a run that is
    resumed, has to give the same bits: compare these with `torch.equal`. Logits of a loaded model are not among them.
    MKL adds up a single row in another order where weights are not aligned to 16 bytes, as they may be in a file.

    Args:
        found: what is tested.
        expected: what it has to be; not all of it nought, to which nothing is near.
        share: the deviation that is allowed, of the largest element expected; say why where it is not the usual one.
    """
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert expected.any(), "everything expected is nought"
    found_deviation = deviation(found, expected)
    assert found_deviation <= share, f"{found_deviation:.2g} of the largest element; {share:.0e} is allowed"
