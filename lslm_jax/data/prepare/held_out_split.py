"""The share of a source that is held out, settled before any work: a few documents must give at least one."""

from collections.abc import Mapping

from lslm_jax.config import Config, Source
from lslm_jax.data import encode_examples
from lslm_jax.data.encode_examples import Recipe
from lslm_jax.data.prepare import cleaning, long_documents, worker_pool
from lslm_jax.data.readers import files, sources
from lslm_jax.data.readers.example_schema import RecordError
from lslm_jax.data.readers.sources import Document
from lslm_jax.errors import InputMissing

_ENOUGH = 10  # documents expected in the share from which chance serves
_MANY = 1 << 20  # documents of which one at least is in the share, however small that is


def fractions(config: Config, recipes: Mapping[str, Recipe]) -> dict[str, float]:
    """The `valid_fraction` of each source by which its documents are to be chosen.

    A document is held out if its digest, as a number in [0, 1), is below the fraction. Of few documents, chance may
    choose none or far too many. Their digests are then computed first, and the fraction is the one below which
    `valid_fraction` of them lie, rounded to at least one document and at most all but one.

    Raises:
      InputMissing: a source has a single document, which cannot be shared out.
      DataError: the input is bad.
    """
    return {name: _fraction(config, recipe) for name, recipe in recipes.items()}


def apply(recipes: Mapping[str, Recipe], found: Mapping[str, float]) -> dict[str, Recipe]:
    """The recipes with these fractions; their sources, which are read from, keep those of the config."""
    return {name: recipe._replace(held_out=found.get(name)) for name, recipe in recipes.items()}


def _fraction(config: Config, recipe: Recipe) -> float:
    source, fraction = recipe.source, recipe.source.valid_fraction
    if not fraction or _by_ends(source):
        return fraction
    digests: set[bytes] = set()
    keep_bad = config.clean.bad_records == "skip"
    for document in sources.documents(source, "train", config.data.max_documents, keep_bad):
        if (digest := _digest(document, recipe, config)) is not None:
            digests.add(digest)
        if len(digests) * min(fraction, 1 - fraction) >= _ENOUGH:
            return fraction
        if len(digests) >= _MANY:
            break
    if len(digests) == 1:
        where = " ".join(source.files) or source.tfds
        raise InputMissing(
            f"data.valid_fraction={fraction} cannot be held out of the only {encode_examples.noun(source)} in {where}: "
            "add more, or name others by data.valid_files"
        )
    numbers = sorted(int.from_bytes(digest[:8], "big") for digest in digests)
    count = min(max(1, round(fraction * len(numbers))), len(numbers) - 1)
    return (numbers[count - 1] + numbers[count]) / 2**65 if numbers else fraction


def _by_ends(source: Source) -> bool:
    return source.source == "files" and sources.holds_out_ends(source, files.inputs(source, "train"))


def _digest(document: Document, recipe: Recipe, config: Config) -> bytes | None:
    """The digest of a document that is kept; None for one that is dropped."""
    if worker_pool.is_long(document, recipe):
        assert isinstance(document.content, (str, bytes))
        text = long_documents.cleaned(document.content, config.clean, config.clean.bad_utf8, document.origin)
        return None if text is None or cleaning.length_reason(text.length, config.clean) else text.digest
    try:
        example = encode_examples.decode(document.content, recipe, config.clean.bad_utf8, document.origin)
    except RecordError:
        if config.clean.bad_records == "strict":
            raise
        return None
    if example is None:
        return None
    example = encode_examples.cleaned(example, recipe, config.clean)
    return None if encode_examples.reason(example, recipe, config.clean) else encode_examples.digest(example, recipe)


def describe(config: Config, named: Mapping[str, Source]) -> list[str]:
    """Lines for sources of which the ends of files are held out."""
    return [
        f"the last {100 * source.valid_fraction:g} % of each text file is held out (data.valid_fraction)"
        for source in named.values()
        if source.valid_fraction and _by_ends(source)
    ]
