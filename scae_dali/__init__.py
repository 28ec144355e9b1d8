"""SCAE, saliency-guided and class-adaptive erasing, for NVIDIA DALI pipelines.

The names below are loaded at first use, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scae_dali.cache import SaliencyCache
    from scae_dali.config import CropConfig
    from scae_dali.dataset import ImageIndex
    from scae_dali.gradcam import GradCAM
    from scae_dali.iterator import Batch, Loader
    from scae_dali.losses import mixed_cross_entropy
    from scae_dali.ops import SCAE, Stage, Targets
    from scae_dali.refresh import refresh_cache
    from scae_dali.scorecam import ScoreCAM

__all__ = [
    "SCAE",
    "Batch",
    "CropConfig",
    "GradCAM",
    "ImageIndex",
    "Loader",
    "SaliencyCache",
    "ScoreCAM",
    "Stage",
    "Targets",
    "mixed_cross_entropy",
    "refresh_cache",
]

_HOME = {
    "Batch": "iterator",
    "CropConfig": "config",
    "GradCAM": "gradcam",
    "ImageIndex": "dataset",
    "Loader": "iterator",
    "SCAE": "ops",
    "SaliencyCache": "cache",
    "ScoreCAM": "scorecam",
    "Stage": "ops",
    "Targets": "ops",
    "mixed_cross_entropy": "losses",
    "refresh_cache": "refresh",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'scae_dali' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"scae_dali.{_HOME[name]}"), name)
    globals()[name] = value
    return value
