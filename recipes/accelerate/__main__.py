from recipes_minigpt4.accelerate import LAUNCH_CONFIGS


print(LAUNCH_CONFIGS)
