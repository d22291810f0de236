"""The same directory in transformers: what its model says of some rows, layer by layer.

Here alone is torch imported, for whoever asks to be shown that both say the same.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from lslm_jax.convert.hf_mapping import LAYER, Part
from lslm_jax.convert.parity import Reference
from lslm_jax.convert.pretrained import Pretrained
from lslm_jax.data.batch import Batch
from lslm_jax.errors import ConfigError, DataError


def read(source: Pretrained, objective: str, batch: Batch) -> Reference:
    """What transformers says of rows, in float32 on the CPU.

    Raises:
      ConfigError: it is not installed.
      DataError: it cannot load the directory.
    """
    torch, transformers = _packages()
    hidden: dict[str, np.ndarray] = {}
    model = _load(transformers, source, objective)
    with torch.no_grad(), _watched(model, source, hidden):
        out = model(**_inputs(torch, batch))
    logits = torch.stack([out.start_logits, out.end_logits], dim=-1) if objective == "qa" else out.logits
    return Reference(f"transformers {transformers.__version__}", batch, logits.float().numpy(), hidden)


def _packages() -> tuple[Any, Any]:
    try:
        import torch  # type: ignore[import-not-found]
        import transformers  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            "--check needs transformers: pip install torch transformers; or compare with --reference=FILE"
        ) from error
    return torch, transformers


def _load(transformers: Any, source: Pretrained, objective: str) -> Any:
    if objective not in source.family.classes:
        raise ConfigError(f"transformers has no {source.family.model_type} for task.objective={objective}")
    name = source.family.classes[objective]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ConfigError(f"transformers {transformers.__version__} has no {name}: pip install -U transformers")
    path = source.directory
    where = {"gguf_file": path.name} if path.is_file() else {"use_safetensors": True}
    try:
        model = kind.from_pretrained(
            str(path.parent if path.is_file() else path),
            **where,
            dtype="float32",
            attn_implementation="eager",
            local_files_only=True,
        )
    except Exception as error:  # it raises whatever the file at fault made it raise
        raise DataError(f"transformers cannot load {path}: {str(error).strip().partition(chr(10))[0]}") from error
    return model.eval()


def _inputs(torch: Any, batch: Batch) -> dict[str, Any]:
    tensor = lambda array: torch.tensor(np.asarray(array, np.int64))
    if batch.source_BS is not None:
        source = {"input_ids": tensor(batch.source_BS), "attention_mask": tensor(batch.source_segments_BS)}
        return source | {"decoder_input_ids": tensor(batch.tokens_BT)}
    types = {} if batch.types_BT is None else {"token_type_ids": tensor(batch.types_BT)}
    return {"input_ids": tensor(batch.tokens_BT), "attention_mask": tensor(batch.segments_BT)} | types


@contextlib.contextmanager
def _watched(model: Any, source: Pretrained, hidden: dict[str, np.ndarray]) -> Iterator[None]:
    """Notes what the first block of each stack reads and what each block says."""
    array = lambda x_BTD: x_BTD.detach().float().numpy().copy()

    def note_input(place: str, args: Any, kwargs: Any) -> None:
        hidden[place] = array(args[0] if args else kwargs["hidden_states"])

    def note_output(place: str, output: Any) -> None:
        hidden[place] = array(output[0] if isinstance(output, tuple) else output)

    hooks = []
    for stack, path, layers in _stacks(source):
        for i in range(layers):
            block = model.get_submodule(path.replace(LAYER, str(i)))
            if i == 0:
                before = lambda _, args, kwargs, place=f"{stack}embeddings": note_input(place, args, kwargs)
                hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))
            after = lambda _, args, output, place=f"{stack}layer {i}": note_output(place, output)
            hooks.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _stacks(source: Pretrained) -> Iterator[tuple[str, str, int]]:
    """Of each stack: how we call it, where its layer {i} is in their model, how many there are."""
    for name, place in source.family.modules.items():
        stack, found, rest = name.partition("blocks.")
        if not found or rest != "attention.q":
            continue
        theirs = place.name if isinstance(place, Part) else place
        model = source.model
        layers = model.num_decoder_layers if stack == "decoder." else model.num_layers
        yield stack.replace(".", " "), theirs.partition(LAYER)[0] + LAYER, layers
