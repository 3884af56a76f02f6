"""The suites, one short file each."""

from recipes_minigpt4.evaluation.suite import Suite
from recipes_minigpt4.evaluation.suites.captions import Captions
from recipes_minigpt4.evaluation.suites.coverage import Coverage
from recipes_minigpt4.evaluation.suites.failures import Failures


SUITES: dict[str, type[Suite]] = {suite.name: suite for suite in (Coverage, Failures, Captions)}
