"""The shards of a corpus as an Apache Beam pipeline, for Dataflow, Flink, Spark or one machine.

Each task is an element; what the pipeline calls is what the local engine calls, so that the files
are the same. The workers must reach the text and the folder, and have this project installed.
"""

from collections.abc import Sequence

from experiments.tokenize import plan
from experiments.tokenize.plan import Task


def check() -> None:
    """Raises ValueError where Apache Beam is not installed."""
    try:
        import apache_beam  # noqa: F401 (seconds to import; nobody else needs it)
    except ImportError:
        raise ValueError(
            '--beam: Apache Beam is not installed; it needs an environment of its own: make beam'
        ) from None


def run(tasks: Sequence[Task], options: str) -> None:
    """Writes shards by a Beam pipeline, and waits for it.

    Args:
      tasks: the shards.
      options: of the pipeline and its runner, as `runner=FlinkRunner,parallelism=8`.

    Raises:
      ValueError: no runner of this name.
      RuntimeError: what a shard's task raised, as the runner reports it.
    """
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    if not tasks:
        return
    flags = [f'--{option}' for option in options.split(',') if option]
    with apache_beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        shards = pipeline | 'Shards' >> apache_beam.Create(list(tasks))
        # else a runner may fuse all shards into one worker's work
        spread = shards | 'Spread' >> apache_beam.Reshuffle()
        _ = spread | 'Write' >> apache_beam.Map(plan.write)
