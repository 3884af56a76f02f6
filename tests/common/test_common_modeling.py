"""transformers' own model tests on MiniGPT-4, with and without a Q-Former."""

import contextlib
import unittest
from unittest import mock

import transformers
from common_tests import load
from tiny_common import TinyMiniGPT4
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model


IS_TRANSFORMERS_4 = transformers.__version__.startswith("4.")
ModelTesterMixin = load("test_modeling_common").ModelTesterMixin


class CommonModelTests(ModelTesterMixin):
    all_model_classes = (MiniGPT4Model, MiniGPT4ForConditionalGeneration)
    # Beside `input_ids`, what the comparisons of attention implementations need: each row has a picture.
    additional_model_inputs = ("pixel_values",)
    _is_composite = True
    # `last_hidden_state` is what the projection takes, as wide as the Q-Former or several patches, not as the encoder.
    skip_test_image_features_output_shape = True
    # 4.57 only: masking and pruning of heads, which encoders of its time had and decoders never had; 5.x dropped both.
    test_head_masking = False
    test_pruning = False
    qformer: bool

    def setUp(self):
        self.model_tester = TinyMiniGPT4(self.qformer)
        # The tests tell models with a loss from those without by the names in transformers' own tables, where ours
        # is registered by class and not by name.
        for names, model_class in (
            (MODEL_MAPPING_NAMES, MiniGPT4Model),
            (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MiniGPT4ForConditionalGeneration),
        ):
            patch = mock.patch.dict(names, {"minigpt4": model_class.__name__})
            patch.start()
            self.addCleanup(patch.stop)

        # On 4.57 the model names pixels first, for its image-to-text pipeline alone; these tests mean the text.
        patch = mock.patch.object(MiniGPT4ForConditionalGeneration, "main_input_name", "input_ids")
        patch.start()
        self.addCleanup(patch.stop)

    def test_bc_torch_dtype(self):
        # It opens a subtest for every tensor, and pytest takes longer to report these thousands than to run them.
        with mock.patch.object(self, "subTest", lambda *args, **kwargs: contextlib.nullcontext()):
            super().test_bc_torch_dtype()

    def test_inputs_embeds(self):
        # The embeddings are looked up by the test, and image placeholders lie outside of the vocabulary.
        self.model_tester.text_only = True
        super().test_inputs_embeds()

    def test_inputs_embeds_matches_input_ids(self):
        # As above.
        self.model_tester.text_only = True
        super().test_inputs_embeds_matches_input_ids()

    def test_resize_tokens_embeddings(self):
        # Where the vocabulary grows over the placeholder, this moves, and the test keeps the inputs it made before.
        self.model_tester.text_only = True
        super().test_resize_tokens_embeddings()

    def test_resize_embeddings_untied(self):
        # As above.
        self.model_tester.text_only = True
        super().test_resize_embeddings_untied()

    def test_sdpa_can_dispatch_composite_models(self):
        # 4.57 looks for the parts on the outermost module only, where the model with a head does not have them.
        if IS_TRANSFORMERS_4:
            self.all_model_classes = (MiniGPT4Model,)
        super().test_sdpa_can_dispatch_composite_models()

    def test_generation_tester_mixin_inheritance(self):
        self.skipTest("The source distribution of transformers holds no generation tests to inherit.")


class MiniGPT4ModelTest(CommonModelTests, unittest.TestCase):
    qformer = True


class MiniGPT4WithoutQFormerModelTest(CommonModelTests, unittest.TestCase):
    qformer = False
