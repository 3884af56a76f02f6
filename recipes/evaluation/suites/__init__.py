"""The suites, one short file each."""

from recipes_minigpt4.evaluation.suite import Suite
from recipes_minigpt4.evaluation.suites.abilities import Abilities
from recipes_minigpt4.evaluation.suites.aokvqa import Aokvqa
from recipes_minigpt4.evaluation.suites.captions import Captions
from recipes_minigpt4.evaluation.suites.chair import Chair
from recipes_minigpt4.evaluation.suites.coverage import Coverage
from recipes_minigpt4.evaluation.suites.failures import Failures
from recipes_minigpt4.evaluation.suites.gqa import Gqa
from recipes_minigpt4.evaluation.suites.pope import Pope
from recipes_minigpt4.evaluation.suites.votes import Votes


SUITES: dict[str, type[Suite]] = {
    suite.name: suite for suite in (Coverage, Failures, Abilities, Chair, Aokvqa, Gqa, Pope, Captions, Votes)
}
