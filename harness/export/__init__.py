"""Edited models that leave the house: whole, or as the difference to the base model."""

from harness.export.form import form_note
