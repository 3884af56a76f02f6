"""transformers' own configuration tests on MiniGPT4Config, with and without a Q-Former."""

import unittest

from common_tests import load
from tiny_common import TinyMiniGPT4

from modeling_minigpt4 import MiniGPT4Config


ConfigTester = load("test_configuration_common").ConfigTester


class MiniGPT4ConfigTest(unittest.TestCase):
    def check(self, qformer: bool, **changes):
        self.model_tester = TinyMiniGPT4(qformer)
        # Text modality off: it asks for `vocab_size` on the outer configuration, which composite ones do not have.
        ConfigTester(
            self,
            config_class=MiniGPT4Config,
            has_text_modality=False,
            common_properties=["pad_token_id", "num_query_tokens", "projector_num_layers", "patch_merge_size"],
            num_query_tokens=5,
            projector_num_layers=2,
            **changes,
        ).run_common_tests()

    def test_with_qformer(self):
        self.check(qformer=True)

    def test_without_qformer(self):
        self.check(qformer=False, qformer_config=None)
