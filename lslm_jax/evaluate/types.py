"""What an evaluator is given and what it returns."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from lslm_jax.config import Config, Source
from lslm_jax.data import prefetch
from lslm_jax.data.batch import Batch
from lslm_jax.data.chat.chat_template import Template
from lslm_jax.data.dataloader import EvalInput
from lslm_jax.data.tokenizers.special_tokens import Special
from lslm_jax.models import attention
from lslm_jax.models.attention import Backend
from lslm_jax.parallel.sharding import num_shards
from lslm_jax.runtime import progress


class Report(NamedTuple):
    """What an evaluation found.

    Attributes:
      metrics: numbers by name.
      files: texts by file name, for people and for other programs: translations, answers, tables.
      facts: what else belongs on the record, as the signature of a metric.
      predictions: makes a JSON line per example, in input order; None where there are none.
    """

    metrics: dict[str, float]
    files: dict[str, str]
    facts: dict[str, Any]
    predictions: Callable[[], Iterator[dict[str, Any]]] | None = None


class Setting(NamedTuple):
    """What an evaluator works with.

    Attributes:
      config: resolved.
      words: the tokenizer; None for synthetic data.
      labels: names of the classes or tags.
      special: ids that are no text.
      backend: attention kernel.
      mesh: where the model lies.
      answerable: whether every question that the model was trained on had an answer.
      template: that conversations are put into words by; None for models that hold none.
    """

    config: Config
    words: Any
    labels: list[str]
    special: Special
    backend: Backend
    mesh: Mesh
    answerable: bool = True
    template: Template | None = None

    def source(self, name: str) -> Source:
        """The source of this name; "" is the only one."""
        return next((source for source in self.config.data.mixture if source.name == name), self.config.data)


Evaluator = Callable[[Any], Report]


def choose_backend(config: Config, mesh: Mesh, inputs: Sequence[Any]) -> Backend:
    """The attention kernel for the rows of these inputs on this mesh."""
    device = mesh.devices.flat[0]
    gpu = device.platform == "gpu"
    segmented = config.data.mask_documents or config.task.objective != "causal"
    # Counting the documents of every row takes a while, and only cuDNN asks.
    max_segments = max((data.max_segments() for data in inputs), default=1) if gpu and segmented else int(segmented)
    return attention.choose(
        config.model.attention,
        platform=device.platform,
        compute_capability=float(device.compute_capability) if gpu else 0.0,
        dtype=config.model.activations,
        head_dim=config.model.head_dim,
        length=config.data.seq_len,
        max_segments=max_segments,
        source_length=config.data.source_len,
        extra=attention.demands(config.model),
        devices=num_shards("length", mesh=mesh),
    )


def batches(part: EvalInput) -> Iterator[Batch]:
    """All batches of a set, made ahead of their use."""
    made = prefetch.batches(part.batch, 0, part.num_batches, through="threads")
    return progress.told(made, "evaluating", part.num_batches)


def joined(reports: dict[str, Report]) -> Report:
    """Reports of several sources as one, each under its source's name; that of the only source "" as it is."""
    name_of = lambda name, what: f"{name}/{what}" if name else what
    file_of = lambda name, what: f"{name}-{what}" if name else what
    return Report(
        {name_of(name, k): v for name, report in reports.items() for k, v in report.metrics.items()},
        {file_of(name, k): v for name, report in reports.items() for k, v in report.files.items()},
        {name_of(name, k): v for name, report in reports.items() for k, v in report.facts.items()},
        (lambda: _predictions(reports)) if any(report.predictions for report in reports.values()) else None,
    )


def _predictions(reports: dict[str, Report]) -> Iterator[dict[str, Any]]:
    """The lines of all sources, each with the name of its source unless it is the only one."""
    for name, report in reports.items():
        for line in report.predictions() if report.predictions else ():
            yield ({"source_name": name} if name else {}) | line
