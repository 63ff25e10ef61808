"""Runs at interpreter start when this folder is on PYTHONPATH: activates the torchvision fix."""

import torchvision_fix

torchvision_fix.install()
