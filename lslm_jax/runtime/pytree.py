"""Arrays of a model or a state by dotted name, free of the classes they sit in, so that files outlive them."""

from collections.abc import Mapping
from typing import Any

import jax


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by name, as `blocks.attention.q.w`."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(like: Any, arrays: Mapping[str, Any]) -> Any:
    """A tree like another, each leaf replaced by the array of its name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[_name(path)], like)


def abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, type and sharding of an array."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def split(tree: Any, chosen: Mapping[str, bool]) -> tuple[Any, Any]:
    """The leaves that are chosen by name, and the others: two trees of the same form, each with None for the rest."""
    keep = lambda wanted: jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if chosen[_name(path)] == wanted else None, tree
    )
    return keep(True), keep(False)


def join(first: Any, second: Any) -> Any:
    """What `split` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
