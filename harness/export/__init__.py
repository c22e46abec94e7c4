"""Edited models that leave the house: whole, or as the difference to the base model."""

# ruff: noqa: F401  the names that others take from this room

from harness.export.form import form_note
