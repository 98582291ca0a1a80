"""Reference models, written against the public API alone. Not part of the wheel: copy what you need."""
