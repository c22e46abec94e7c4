"""The editors and what they are made of. Their table is in editor/registry.py."""
