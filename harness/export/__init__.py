"""Edited models that leave the house: whole, or as the difference to the base model."""
