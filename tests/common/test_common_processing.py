"""transformers' own processor tests on MiniGPT4Processor."""

import unittest
from unittest import mock

import pytest
from common_tests import load

from processing_minigpt4 import MiniGPT4ImageProcessor, MiniGPT4Processor


ProcessorTesterMixin = load("test_processing_common").ProcessorTesterMixin


class MiniGPT4ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MiniGPT4Processor
    image_token = "<image>"

    @pytest.fixture(autouse=True)
    def folder(self, tokenizer, picture, tmp_path, monkeypatch):
        """The saved processor that every test starts from."""
        # Code that travels with a folder is noted in it when it is saved, so the tests see another after saving.
        monkeypatch.setattr(MiniGPT4Processor, "_auto_class", None)
        monkeypatch.setattr(MiniGPT4ImageProcessor, "_auto_class", None)
        self.picture = picture
        type(self).tmpdirname = str(tmp_path)
        type(self).full_tmpdirname = None  # 5.x: there is no larger processor beside it
        processor = MiniGPT4Processor(
            image_processor=MiniGPT4ImageProcessor(size={"height": 28, "width": 28}),
            tokenizer=tokenizer,
            **self.prepare_processor_dict(),
        )
        processor.save_pretrained(tmp_path)

    @classmethod
    def setUpClass(cls):
        pass  # the fixture does what the mixin does here: the tokenizer is a fixture too

    @classmethod
    def tearDownClass(cls):
        pass  # pytest removes the folder

    @staticmethod
    def prepare_processor_dict():
        return {"num_image_tokens": 4, "chat_template": "vicuna_v0"}

    def test_chat_template_save_loading(self):
        # Its templates are plain words, which would be taken for names of templates; Jinja text is what people save.
        with mock.patch("processing_minigpt4.processing_minigpt4._is_jinja", lambda text: True):
            super().test_chat_template_save_loading()

    def test_if_input_has_mismatching_tokens_and_mm_data(self):
        # The same error in other words: ours tells both numbers and what to do.
        text = self.prepare_text_inputs(batch_size=3, modalities="image")
        with self.assertRaisesRegex(ValueError, "have 3 <image> placeholders in all but there are 4 images; write"):
            self.get_processor()(images=[[self.picture()]] * 4, text=text, padding=True)

    def test_replacement_offsets(self):
        self.skipTest(
            "Image placeholders lie outside of the tokenizer's vocabulary and have no text, so there are no places in "
            "decoded text to compare; `mm_token_type_ids` tells where they are."
        )
