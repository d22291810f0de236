"""Every family of transformers, in and out: its outputs and gradients in float32, its weights byte for byte."""

import json
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lslm_jax.config import Config, TaskConfig
from lslm_jax.convert import export, pretrained, safetensors_io, state_dict
from lslm_jax.data.batch import Batch
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.models import attention, layers
from lslm_jax.parallel.sharding import make_mesh
from lslm_jax.train import losses
from lslm_jax.train.train_state import abstract_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, D, H, L, T = 131, 48, 4, 3, 20
B, S, LABELS = 2, 26, 5
ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LIKE_LLAMA = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 80,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LIKE_BERT = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 80,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_labels": LABELS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PAIR = {
    "vocab_size": V,
    "d_model": D,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = PAIR | {
    "d_kv": 16,
    "d_ff": 80,
    "num_layers": L,
    "num_decoder_layers": 2,
    "num_heads": H,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 18,
    "dropout_rate": 0.0,
    "initializer_factor": 0.5,  # as it is, outputs of T5 1.1 are large, and so is their rounding
}
MARIAN = PAIR | {
    "encoder_layers": L,
    "decoder_layers": 2,
    "encoder_attention_heads": H,
    "decoder_attention_heads": H,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": 32,
    "scale_embedding": True,
    "activation_function": "swish",
    "dropout": 0.0,
    "forced_eos_token_id": 2,
}


class Case(NamedTuple):
    """A model of theirs: the beginning of its class's name, its settings, and for which objective of ours."""

    name: str
    settings: dict[str, Any]
    objective: str = "causal"


def like_llama(name, **settings):
    return Case(name, LIKE_LLAMA | {"rope_parameters": dict(ROPE)} | settings)


def encoder(name, objective, **settings):
    return Case(name, LIKE_BERT | settings | ({"num_labels": 2} if objective == "qa" else {}), objective)


MODERN = {"global_attn_every_n_layers": 2, "local_attention": 8, "mlp_dropout": 0.0, "classifier_pooling": "mean"}
MODERN |= {"classifier_activation": "gelu", "attn_implementation": "eager", "decoder_bias": True}
DISTIL = {"dim": D, "n_layers": L, "n_heads": H, "hidden_dim": 80, "dropout": 0.0, "attention_dropout": 0.0}
DISTIL |= {"seq_classif_dropout": 0.0, "qa_dropout": 0.0}
ROBERTA = NO_DROPOUT | {"max_position_embeddings": 34, "layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1}
GPT2 = {
    "vocab_size": V,
    "n_positions": 32,
    "n_embd": D,
    "n_layer": L,
    "n_head": H,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NEOX = {name: value for name, value in LIKE_LLAMA.items() if name not in ("head_dim", "num_key_value_heads")}
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 5, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES = {
    "gpt2": Case("GPT2", GPT2),
    "llama2": like_llama("Llama"),
    "llama3": like_llama("Llama", rope_parameters=LLAMA3),
    "smollm2": like_llama("Llama", tie_word_embeddings=True),
    "mistral": like_llama("Mistral", sliding_window=7),
    "mixtral": like_llama("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=7),
    "qwen2": like_llama("Qwen2"),
    "qwen2-windows": like_llama("Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": like_llama("Qwen3"),
    "gemma2": like_llama("Gemma2", **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": like_llama("Gemma3", **GEMMA, rope_parameters=GEMMA3_ROPE, layer_types=None, sliding_window_pattern=2),
    "smollm3": like_llama("SmolLM3", no_rope_layer_interval=2, tie_word_embeddings=True),
    "olmo2": like_llama("Olmo2"),
    "pythia": Case("GPTNeoX", NEOX | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}),
    "gpt-neox-in-turn": Case(
        "GPTNeoX", NEOX | {"use_parallel_residual": False, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}
    ),
    **{f"bert-{task}": encoder("Bert", task, **NO_DROPOUT) for task in ("masked", "classification", "tagging", "qa")},
    **{f"roberta-{task}": encoder("Roberta", task, **ROBERTA) for task in ("masked", "classification", "qa")},
    **{f"distilbert-{task}": encoder("DistilBert", task, **DISTIL) for task in ("masked", "classification", "qa")},
    **{f"modernbert-{task}": encoder("ModernBert", task, **MODERN) for task in ("masked", "classification", "qa")},
    "t5": Case("T5", T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True}, "seq2seq"),
    "flan-t5": Case("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, "seq2seq"),
    "marian": Case("Marian", MARIAN, "seq2seq"),
}
KINDS = {
    "causal": "ForCausalLM",
    "masked": "ForMaskedLM",
    "classification": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "qa": "ForQuestionAnswering",
    "seq2seq": "ForConditionalGeneration",
}
CLASSES = {"GPT2": "GPT2LMHeadModel", "Marian": "MarianMTModel"}


def make(case):
    """A random model of theirs, its norms and biases not what they start as."""
    torch.manual_seed(0)
    kind = "Gemma3Text" if case.name == "Gemma3" else case.name
    settings = getattr(transformers, f"{kind}Config")(**case.settings)
    theirs = getattr(transformers, CLASSES.get(case.name, case.name + KINDS[case.objective]))(settings)
    if case.settings.get("feed_forward_proj") == "gated-gelu":
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(V, D) * 0.3)  # they tie it all the same
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in theirs.named_buffers():
            if name == "final_logits_bias":
                buffer.add_(torch.randn_like(buffer))
    return theirs.float().train()


def load(directory, objective, **settings):
    """A directory of theirs as a model of ours; with the number of labels, which are not the model's alone."""
    source = pretrained.describe(directory)
    labels = 2 if objective == "qa" else LABELS
    source = source._replace(model=replace(source.model, num_labels=labels, dropout=0.0, **settings))
    config = Config(model=source.model, task=TaskConfig(objective=objective))
    return source, pretrained.load(source, objective, abstract_model(config, make_mesh(config))).model


def example(case, model):
    """A batch for an objective; where models read it as a whole, with padding, which is token 1 (RoBERTa's)."""
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(2, V, (B, T))
    if model.family == "decoder":
        return Batch(tokens_BT, rng.integers(0, V, (B, T)), np.ones((B, T), np.float32))
    rows = np.arange(T)[None] < np.array([[T], [T - 6]])
    segments_BT = rows.astype(np.int32)
    if model.family == "encoder_decoder":
        source_segments_BS = (np.arange(S)[None] < np.array([[S - 5], [S]])).astype(np.int32)
        source_BS = np.where(source_segments_BS, rng.integers(2, V, (B, S)), 1)
        source = {"source_BS": source_BS, "source_segments_BS": source_segments_BS}
        targets_BT = rng.integers(0, V, (B, T))
        return Batch(tokens_BT, targets_BT, rows.astype(np.float32), segments_BT=segments_BT, **source)
    types_BT = np.where(rows & (np.arange(T)[None] > 8), 1, 0) % max(model.token_types, 1)
    whole = {"segments_BT": segments_BT, "types_BT": types_BT if model.token_types else None}
    tokens_BT = np.where(rows, tokens_BT, 1)
    ones = lambda n: np.ones((B, n), np.float32)
    match case.objective:
        case "masked":
            places_BP = np.array([[1, 4, 5, 0], [0, 7, 13, 0]])
            weights_BP = ones(4) * np.array([[1, 1, 1, 0]], np.float32)
            return Batch(tokens_BT, rng.integers(0, V, (B, 4)), weights_BP, **whole, places_BP=places_BP)
        case "classification":
            return Batch(tokens_BT, rng.integers(0, LABELS, (B, 1)), ones(1), **whole)
        case "qa":
            return Batch(tokens_BT, rng.integers(0, T - 6, (B, 2)), ones(2), **whole)
    return Batch(tokens_BT, rng.integers(0, LABELS, (B, T)), rows.astype(np.float32), **whole)


def their_outputs(theirs, case, batch):
    """What their model says of a batch for each target, and its mean loss."""
    tensor = lambda a: torch.tensor(np.asarray(a, np.int64))
    if case.objective == "seq2seq":
        sources = {"input_ids": tensor(batch.source_BS), "attention_mask": tensor(batch.source_segments_BS)}
        logits = theirs(**sources, decoder_input_ids=tensor(batch.tokens_BT)).logits
    elif case.objective == "causal":
        logits = theirs(tensor(batch.tokens_BT)).logits
    else:
        types = {} if batch.types_BT is None else {"token_type_ids": tensor(batch.types_BT)}
        out = theirs(input_ids=tensor(batch.tokens_BT), attention_mask=tensor(batch.segments_BT), **types)
        if case.objective == "qa":
            cross_entropy = torch.nn.functional.cross_entropy
            targets_B2 = tensor(batch.targets_BT)
            mask_BT = torch.where(tensor(batch.segments_BT) > 0, 0.0, -torch.inf)
            loss = cross_entropy(out.start_logits + mask_BT, targets_B2[:, 0])
            loss = (loss + cross_entropy(out.end_logits + mask_BT, targets_B2[:, 1])) / 2
            return torch.stack([out.start_logits, out.end_logits], dim=-1), loss
        logits = out.logits[:, None] if out.logits.ndim == 2 else out.logits
        if case.objective == "masked":
            logits = torch.take_along_dim(logits, tensor(batch.places_BP)[:, :, None], dim=1)
    flat = logits.reshape(-1, logits.shape[-1])
    losses = torch.nn.functional.cross_entropy(flat, tensor(batch.targets_BT).reshape(-1), reduction="none")
    weights = torch.tensor(batch.weights_BT).reshape(-1)
    return logits, (losses * weights).sum() / weights.sum()


def our_outputs(model, case, batch):
    """The mean loss of our model, and what it says."""
    x_BPD = model.features(batch, backend=attention.XLA)
    w_VD, b_V = model.output()
    if case.objective == "qa":
        sums = losses.span(x_BPD, w_VD, batch.targets_BT, batch.weights_BT, batch.segments_BT, b_V)
    else:
        size = model.config.vocab_size if case.objective in ("causal", "masked", "seq2seq") else w_VD.shape[0]
        settings = losses.Settings(vocab_size=size, chunk=8, softcap=model.config.logit_softcap)
        sums = losses.cross_entropy(x_BPD, w_VD, batch.targets_BT, batch.weights_BT, settings, b_V)
    logits_BPV = x_BPD @ w_VD.T
    logits_BPV = logits_BPV if b_V is None else logits_BPV + b_V[None, None]
    return sums.objective / sums.weight, layers.softcap(logits_BPV, model.config.logit_softcap)


def stored(sources):
    return {name: source.make().reshape(source.shape) for name, source in sources.items()}


def as_stored(arrays):
    """With experts apart, as files have them; transformers keeps those of a layer in one array."""
    stored = {}
    for name, array in arrays.items():
        layer, found, last = name.partition(".mlp.experts.")
        for e, matrix in enumerate(array if found else []):
            parts = {"w2": matrix} if last == "down_proj" else dict(zip(("w1", "w3"), np.split(matrix, 2), strict=True))
            stored |= {f"{layer}.block_sparse_moe.experts.{e}.{w}.weight": part for w, part in parts.items()}
        if not found:
            stored[name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")] = array
    return stored


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_gradients_and_weights_are_those_of_transformers(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path / "theirs")
    source, model = load(tmp_path / "theirs", case.objective)
    batch = example(case, source.model)
    expected, loss = their_outputs(theirs, case, batch)
    loss.backward()
    on_device = jax.tree.map(jnp.asarray, batch)
    gradient = jax.jit(jax.value_and_grad(lambda model: our_outputs(model, case, on_device), has_aux=True))
    (value, logits_BPV), gradients = gradient(model)

    counted = np.ones(logits_BPV.shape[:2], bool)
    if case.objective not in ("qa", "causal"):
        counted = batch.weights_BT > 0
    if case.objective == "qa":
        counted = batch.segments_BT > 0
    logits_BPV = logits_BPV[..., : expected.shape[-1]]
    error = np.max(np.abs(logits_BPV - expected.detach().numpy())[counted])
    exported = lambda tree: stored(state_dict.sources(tree, source.family, source.model, case.objective, "float32"))
    expected_gradients = as_stored(
        {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    )
    # Relative to the largest entry of all: some gradients, as those of the keys' biases, are nothing but rounding.
    largest = max(np.max(np.abs(gradient)) for gradient in expected_gradients.values())
    ours = exported(gradients)
    difference = {name: np.max(np.abs(ours[name] - g)) for name, g in expected_gradients.items() if name in ours}
    name = max(difference, key=difference.get)
    worst = difference[name] / largest
    print(f"outputs differ by {error:.1e}, loss by {abs(value - loss.item()):.1e}, gradients by {worst:.1e} ({name})")
    assert expected_gradients.keys() - ours.keys() <= {"lm_head.weight"}
    assert error < 1e-5
    assert abs(value - loss.item()) < 1e-6
    assert worst < 1e-5

    # The way back: byte for byte what came, in a directory that they read as they read their own.
    files = {**safetensors_io.open_directory(epath.Path(tmp_path / "theirs"))}
    for name, array in exported(model).items():
        assert array.tobytes() == files[name].read().tobytes(), name
    out = epath.Path(tmp_path / "ours")
    out.mkdir()
    sources = state_dict.sources(model, source.family, source.model, case.objective, "float32")
    safetensors_io.write_directory(out, sources)
    tokens = {"bos": 0, "eos": 2, "pad": 1} if case.name == "Roberta" else {"bos": 1, "eos": 2, "pad": 0}
    names = [f"L{i}" for i in range(LABELS)] if case.objective in ("classification", "tagging") else []
    settings = export.export_settings(source.family, source.model, case.objective, "float32", tokens, names)
    (out / "config.json").write_text(json.dumps(settings))
    again, report = type(theirs).from_pretrained(out, output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        np.testing.assert_allclose(their_outputs(again, case, batch)[0], expected.detach(), atol=1e-5)


@pytest.mark.parametrize("config", ["quickstart", "gpt2_small"])
def test_what_is_trained_here_transformers_loads_and_it_writes_the_same(config, tmp_path, command):
    run, out = f"--workdir={tmp_path}/run", tmp_path / "out"
    text = "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n"
    for i in range(8):
        (tmp_path / f"{i}.py").write_text("".join(text.replace("add", f"add{j}") for j in range(i * 40, i * 40 + 40)))
    settings = [
        f"--config=configs/{config}.py:smoke",
        f"--config.data.files={tmp_path}/*.py",
        "--config.train.steps=40",
    ]
    settings += ["--config.data.source=files", "--config.data.valid_fraction=0.2", "--config.tokenizer.vocab_size=300"]
    command(*settings, run)
    command("export", run, f"--to={out}")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    words = transformers.AutoTokenizer.from_pretrained(out)
    prompt = "def add7(a, b):\n    return"
    ids = model.generate(**words(prompt, return_tensors="pt"), max_new_tokens=24, do_sample=False)
    asked = ["generate", run, f"--prompt={prompt}", "--json", "--config.generate.temperature=0"]
    ours = json.loads(command(*asked, "--config.generate.max_tokens=24"))
    assert words.decode(ids[0], skip_special_tokens=True) == prompt + ours["text"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (12, 18), (64, 1000)])
def test_distances_fall_into_the_buckets_of_transformers(causal, buckets, farthest):
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    distance_TS = np.arange(700)[None, :] - np.arange(600)[:, None]
    expected_TS = bucket(torch.tensor(distance_TS), not causal, buckets, farthest).numpy()
    table_NH = jnp.arange(buckets, dtype=jnp.float32)[:, None]
    bias_HTS = layers.relative_bias(table_NH, 600, 700, 0, causal=causal, farthest=farthest)
    np.testing.assert_array_equal(bias_HTS[0], expected_TS)


def test_the_trained_llama_tells_its_story_and_weighs_a_text_as_transformers_does(shared, command):
    directory = shared / "models" / "stories260K"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    words = transformers.AutoTokenizer.from_pretrained(directory)
    begin = torch.tensor([[words.bos_token_id]])
    ids = theirs.generate(begin, attention_mask=torch.ones_like(begin), max_new_tokens=200, do_sample=False)
    found = json.loads(
        command("generate", f"--pretrained={directory}", "--prompt=", "--json", "--config.generate.max_tokens=200")
    )
    assert found["text"] == words.decode(ids[0], skip_special_tokens=True)
    assert found["tokens"] == ids.shape[1] - 1 > 150

    source = pretrained.describe(directory)
    config = Config(model=source.model)
    model = pretrained.load(source, "causal", abstract_model(config, make_mesh(config))).model
    ours = load_tokenizer(pretrained.vocabulary(source.directory))
    text = "Once upon a time, Tom had a red ball. He threw it over the house and it was gone. Tom was sad."
    read_1T = torch.tensor([[ours.bos_id, *ours.encode(text).tolist()]])
    assert read_1T[0].tolist() == words(text)["input_ids"]
    with torch.no_grad():
        expected = theirs(read_1T, labels=read_1T).loss.item()
    tokens_BT = read_1T.numpy()
    batch = Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], np.ones_like(tokens_BT[:, 1:], np.float32))
    loss, _ = our_outputs(model, Case("Llama", {}), batch)
    print(f"loss {expected:.6f}, differs by {abs(loss - expected):.1e}")
    assert abs(loss - expected) < 1e-5
