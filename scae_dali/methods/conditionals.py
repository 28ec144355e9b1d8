"""Whether the pipeline that is being defined may branch on data, which some methods need."""

from nvidia.dali import Pipeline
from nvidia.dali.pipeline import do_not_convert


@do_not_convert
def require(where: str, remedy: str) -> None:
    """Raise ValueError in a pipeline without conditionals. where: what needs them; remedy: how to
    do without."""
    if not getattr(Pipeline.current(), "_conditionals_enabled", True):
        raise ValueError(
            f"enable_conditionals must be True where {where}: define the pipeline with "
            f"@pipeline_def(enable_conditionals=True, ...), or {remedy}"
        )
