"""transformers' own image processor tests on MiniGPT4ImageProcessor."""

import unittest

from common_tests import load

from processing_minigpt4 import MiniGPT4ImageProcessor


image_tests = load("test_image_processing_common")


class TinyPictures:
    """What the mixin calls an image processor tester: options, and pictures of random sizes."""

    batch_size = 7
    num_channels = 3
    do_convert_rgb = True
    min_resolution = 30
    max_resolution = 90
    image_processing_classes = {"pil": MiniGPT4ImageProcessor}  # asked for by 5.x

    def prepare_image_processor_dict(self):
        return {
            "do_resize": True,
            "size": {"height": 18, "width": 20},
            "do_normalize": True,
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.5, 0.6, 0.7],
            "do_convert_rgb": self.do_convert_rgb,
        }

    def expected_output_image_shape(self, images):
        return self.num_channels, 18, 20

    def prepare_image_inputs(self, batch_size=None, num_channels=None, **kwargs):
        return image_tests.prepare_image_inputs(
            batch_size=batch_size or self.batch_size,
            num_channels=num_channels or self.num_channels,
            min_resolution=self.min_resolution,
            max_resolution=self.max_resolution,
            **kwargs,
        )

    def prepare_processor_inputs(self, **kwargs):
        return {"images": self.prepare_image_inputs(**kwargs)}


class MiniGPT4ImageProcessorTest(image_tests.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = TinyPictures  # 5.x
    image_processing_class = MiniGPT4ImageProcessor  # 4.57

    def setUp(self):
        self.image_processor_tester = TinyPictures()
        self.image_processor_list = [MiniGPT4ImageProcessor]  # 4.57

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()

    def test_call_numpy_4_channels(self):
        # 5.x switches this off by itself, 4.57 does not: with it, three channels come out.
        self.image_processor_tester.do_convert_rgb = False
        super().test_call_numpy_4_channels()

    def test_new_models_require_torchvision_backend(self):
        self.skipTest("Only one class can travel with a checkpoint, and Pillow's resizing is what the original used.")
