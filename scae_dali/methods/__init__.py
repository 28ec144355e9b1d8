"""Augmentations, one a module; `base` says what they share and `load` finds them by name."""

from scae_dali.methods.base import BUILT_IN, Config, Method, Run, Samples, Status, load, make_config

__all__ = ["BUILT_IN", "Config", "Method", "Run", "Samples", "Status", "load", "make_config"]
