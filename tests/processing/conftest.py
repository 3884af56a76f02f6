"""Language models with chat templates of their own, for the tests of this folder."""

from typing import Any

import pytest
from inner_templates import FAMILIES, family_tokenizer
from tiny_text import make_processor


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    name = request.param
    tokenizer = family_tokenizer(name)
    _, _, _, _, end, has_system = FAMILIES[name]
    return name, tokenizer, make_processor(tokenizer, chat_template="wrapped"), end, has_system
