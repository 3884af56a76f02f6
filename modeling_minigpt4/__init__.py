"""MiniGPT-4 for transformers. Importing this package registers the model with every Auto class there is."""

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from processing_minigpt4 import MiniGPT4DataCollator, MiniGPT4ImageProcessor, MiniGPT4Processor, ReplyStreamer

from .configuration_minigpt4 import MiniGPT4Config
from .conversation_minigpt4 import Conversation, Turn
from .modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model, MiniGPT4PreTrainedModel
from .version import __version__


AutoConfig.register("minigpt4", MiniGPT4Config)
AutoModel.register(MiniGPT4Config, MiniGPT4Model)
AutoProcessor.register(MiniGPT4Config, MiniGPT4Processor)
AutoImageProcessor.register(MiniGPT4Config, slow_image_processor_class=MiniGPT4ImageProcessor)
# There is none for videos; pipelines of 5.x would take the image processor's code for one and ask whether to run it.
VIDEO_PROCESSOR_MAPPING.register(MiniGPT4Config, None)

# AutoModelForVision2Seq went with transformers 5.0, where AutoModelForImageTextToText is its name;
# AutoModelForMultimodalLM came with 5.x. Whichever is there knows the model.
AutoModelForVision2Seq = getattr(transformers, "AutoModelForVision2Seq", AutoModelForImageTextToText)
AutoModelForMultimodalLM = getattr(transformers, "AutoModelForMultimodalLM", AutoModelForImageTextToText)
for _auto_class in {AutoModelForImageTextToText, AutoModelForVision2Seq, AutoModelForMultimodalLM}:
    _auto_class.register(MiniGPT4Config, MiniGPT4ForConditionalGeneration)

__all__ = [
    "AutoModelForVision2Seq",
    "Conversation",
    "MiniGPT4Config",
    "MiniGPT4DataCollator",
    "MiniGPT4ForConditionalGeneration",
    "MiniGPT4ImageProcessor",
    "MiniGPT4Model",
    "MiniGPT4PreTrainedModel",
    "MiniGPT4Processor",
    "ReplyStreamer",
    "Turn",
    "__version__",
]
