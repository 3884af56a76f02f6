"""Marks that transformers' common tests carry, so that pytest knows them."""

import pytest


MARKS = (
    "accelerate_tests",
    "bitsandbytes",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "generate",
    "order",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKS:
        config.addinivalue_line("markers", f"{name}: set by transformers' common tests")
