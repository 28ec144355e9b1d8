"""Ready-made training pipelines and their settings."""

from scae_dali.checks import check_dali

check_dali()
