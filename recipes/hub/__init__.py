"""The Hub: model card, publishing, push, and conversion of the checkpoints that the authors of MiniGPT-4 released."""
