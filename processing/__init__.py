"""Text and pictures to model inputs: the processor, the image processor and the chat templates of MiniGPT-4."""

from .chat_templates_minigpt4 import available_chat_templates, load_chat_template, wrap_chat_template
from .collator_minigpt4 import MiniGPT4DataCollator
from .image_processing_minigpt4 import MiniGPT4ImageProcessor
from .processing_minigpt4 import MiniGPT4Processor
from .streaming_minigpt4 import ReplyStreamer


__all__ = [
    "MiniGPT4DataCollator",
    "MiniGPT4ImageProcessor",
    "MiniGPT4Processor",
    "ReplyStreamer",
    "available_chat_templates",
    "load_chat_template",
    "wrap_chat_template",
]
