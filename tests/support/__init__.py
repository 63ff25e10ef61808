"""Builders shared by the tests: `from support.models import tiny_unet`."""
