"""Augmentations, one a module; `base` says what they share and `loading` finds them by name."""

from scae_dali.methods.base import Config, GuidedConfig, Method, Run, Samples, Status
from scae_dali.methods.loading import BUILT_IN, load, make_config

__all__ = [
    "BUILT_IN",
    "Config",
    "GuidedConfig",
    "Method",
    "Run",
    "Samples",
    "Status",
    "load",
    "make_config",
]
