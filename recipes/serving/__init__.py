"""Talk to models, show them, serve them: `minigpt4 describe`, `chat`, `app` and `serve`."""
