"""What the files beside a Hugging Face vocabulary say of it, and BERT's vocab.txt."""

from typing import Any

from etils import epath

from lslm_jax import atomic
from lslm_jax.data.tokenizer_base import WELL_KNOWN


def named_tokens(directory: epath.Path) -> dict[str, str | int]:
    """Special tokens by role, or their ids, as the files beside a tokenizer.json name them; "" for no bos."""
    read = lambda name: atomic.read_json(directory / name) if (directory / name).is_file() else {}
    model = read("config.json")
    # What an encoder-decoder writes begins with this, and not with the bos of its vocabulary.
    start_id = model.get("decoder_start_token_id") if model.get("is_encoder_decoder") else None
    start = {} if start_id is None else {"bos": start_id}
    for settings in (read("tokenizer_config.json"), read("special_tokens_map.json")):
        tokens = {role: settings[f"{role}_token"] for role in WELL_KNOWN if settings.get(f"{role}_token")}
        if tokens:
            named = {role: token["content"] if isinstance(token, dict) else token for role, token in tokens.items()}
            lacks = {"bos": ""} if settings.get("bos_token", "") is None else {}
            return named | lacks | start
    return start


def from_word_pieces(path: epath.Path, tokenizers: Any) -> bytes:
    """The tokenizer.json of a vocab.txt (BERT): a piece a line, in lower case unless the file beside says otherwise."""
    beside = path.parent / "tokenizer_config.json"
    settings = atomic.read_json(beside) if beside.is_file() else {}
    pieces = path.read_text().splitlines()
    lower = settings.get("do_lower_case", True)
    made = tokenizers.BertWordPieceTokenizer(
        {piece: id for id, piece in enumerate(pieces)},
        lowercase=lower,
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    return made.to_str().encode()
