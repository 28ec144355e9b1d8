"""Puts methods into DALI pipelines: a batch's plan as a table, the stage, and the loader."""

from scae_dali.checks import check_dali

check_dali()
