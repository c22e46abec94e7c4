"""Edited models that leave the house: whole, or as the difference to the base model."""

from harness.export.delta import read_delta
from harness.export.load import edited_by_delta, edited_by_run, find_checkpoint, source_of_delta, source_of_run, when_of
