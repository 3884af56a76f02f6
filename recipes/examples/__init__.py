"""Five short scripts, each a whole task to copy and change; `python -m recipes_minigpt4.examples.NAME` runs one."""
