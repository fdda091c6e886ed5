"""Imported by the process that workers of `place prepare` are forked from, so that the slow imports happen once."""

from place.compat import patch_torchvision

patch_torchvision()

import streaming  # noqa: E402, F401
