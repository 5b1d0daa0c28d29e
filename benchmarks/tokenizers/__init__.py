"""The experiment of docs/tokenizers.md: see `__main__.py`."""
