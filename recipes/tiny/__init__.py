"""The embedded world: MiniGPT-4 in miniature, offline, on a laptop.

Generated scenes (`scenes`), the words to measure a reply with (`metrics`), the text a language model can learn the
scenes' language from (`corpus`), and the script that made the frozen backbones in `backbones/` (`pretrain`).
"""

from pathlib import Path


BACKBONES = Path(__file__).parent / "backbones"
VISION_BACKBONE = BACKBONES / "blip2"  # vision encoder, Q-Former and query tokens, in BLIP-2's own layout
LANGUAGE_BACKBONE = BACKBONES / "llama"  # a LlamaForCausalLM and its tokenizer; it has never seen an image
