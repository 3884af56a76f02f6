"""
The same numbers as the original code, stage by stage, through the package's own processor, recipes and trainer.

Each stage is compared, because errors hide: with a wrong epsilon in `ln_vision` the image features are off by 1e-4
while the loss still agrees. `test_parity_mutations.py` shows at which stage a mistake comes to light.
"""

from collections.abc import Callable

import pytest
from parity_case import VARIANTS, Case, Stage, build_case, stages_of


CASES = [(variant, attention) for variant in VARIANTS for attention in ("eager", "sdpa")]


@pytest.fixture(scope="module")
def case_of() -> Callable[[str, str], Case]:
    """Each case once, so that its stages share what is computed for several of them."""
    cases: dict[tuple[str, str], Case] = {}

    def get(variant: str, attention: str) -> Case:
        if (variant, attention) not in cases:
            cases[variant, attention] = build_case(variant, attention)
        return cases[variant, attention]

    return get


@pytest.mark.parametrize(
    ("variant", "attention", "stage"),
    [
        pytest.param(variant, attention, stage, id=f"{variant}-{attention}-{stage.name}")
        for variant, attention in CASES
        for stage in stages_of(variant)
    ],
)
def test_stage_is_the_original_s(case_of: Callable, variant: str, attention: str, stage: Stage) -> None:
    stage.check(case_of(variant, attention))
