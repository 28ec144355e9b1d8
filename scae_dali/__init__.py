"""SCAE, saliency-guided and class-adaptive erasing, for NVIDIA DALI pipelines.

The names below are loaded at first use, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scae_dali.cache import SaliencyCache
    from scae_dali.data.index import ImageIndex
    from scae_dali.plan.crop import CropConfig
    from scae_dali.saliency.gradcam import GradCAM
    from scae_dali.saliency.refresh import refresh_cache
    from scae_dali.saliency.scorecam import ScoreCAM
    from scae_dali.saliency.stage import SCAE, Stage
    from scae_dali.saliency.whole import whole_loader
    from scae_dali.stage.loader import Batch, Loader
    from scae_dali.stage.stage import Targets
    from scae_dali.training.losses import logit_adjustment, mixed_cross_entropy

__version__ = "0.1.0"

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
    "logit_adjustment",
    "mixed_cross_entropy",
    "refresh_cache",
    "whole_loader",
]

_HOME = {
    "Batch": "stage.loader",
    "CropConfig": "plan.crop",
    "GradCAM": "saliency.gradcam",
    "ImageIndex": "data.index",
    "Loader": "stage.loader",
    "SCAE": "saliency.stage",
    "SaliencyCache": "cache",
    "ScoreCAM": "saliency.scorecam",
    "Stage": "saliency.stage",
    "Targets": "stage.stage",
    "logit_adjustment": "training.losses",
    "mixed_cross_entropy": "training.losses",
    "refresh_cache": "saliency.refresh",
    "whole_loader": "saliency.whole",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'scae_dali' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"scae_dali.{_HOME[name]}")
    except ModuleNotFoundError:
        importlib.import_module("scae_dali.checks").check_dali()
        raise
    value = getattr(module, name)
    globals()[name] = value
    return value
