"""One client for whoever mends or judges: OpenAI-compatible servers, chat models of transformers, scripted answers."""
