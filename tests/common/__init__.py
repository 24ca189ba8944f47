"""Shared test batteries and helpers, imported as `common.<module>` (pytest puts `tests/` on the path)."""
