"""Build a Hugging Face class without weights from a config's JSON; read its shapes and tensors."""
