"""To and from the Hub: the model card, publishing, and the files that the authors of MiniGPT-4 released."""
