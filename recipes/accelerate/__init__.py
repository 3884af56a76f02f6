"""Configurations of `accelerate launch`; `python -m recipes_minigpt4.accelerate` tells where they are.

    accelerate launch --config_file "$(python -m recipes_minigpt4.accelerate)/fsdp2.yaml" \\
        -m recipes_minigpt4.stage1_pretrain --config stage1_vicuna_7b
"""

from pathlib import Path


LAUNCH_CONFIGS = Path(__file__).parent
