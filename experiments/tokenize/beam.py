"""Writes shards with an Apache Beam pipeline, on Dataflow, Flink, Spark or one machine.

Each task is one element. The pipeline calls the same functions as the local engine, and so writes
the same files. Workers need access to the text and the output folder, and this project installed.
"""

from collections.abc import Sequence

from experiments.tokenize import plan
from experiments.tokenize.plan import Task


def check() -> None:
    """Raises ValueError if Apache Beam is not installed."""
    try:
        import apache_beam  # noqa: F401 (takes seconds to import; only needed here)
    except ImportError:
        raise ValueError(
            '--beam: Apache Beam is not installed; create its separate environment: make beam'
        ) from None


def run(tasks: Sequence[Task], options: str) -> None:
    """Writes shards with a Beam pipeline and waits for it.

    Args:
      tasks: the shards to write.
      options: options of the pipeline and its runner, as in `runner=FlinkRunner,parallelism=8`.

    Raises:
      ValueError: the runner is unknown.
      RuntimeError: a task failed; the message is the runner's.
    """
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    if not tasks:
        return
    flags = [f'--{option}' for option in options.split(',') if option]
    with apache_beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        shards = pipeline | 'Shards' >> apache_beam.Create(list(tasks))
        # otherwise a runner may fuse all shards into one worker
        spread = shards | 'Spread' >> apache_beam.Reshuffle()
        _ = spread | 'Write' >> apache_beam.Map(plan.write)
