"""The same weights give the same outputs and gradients as in Hugging Face transformers, in float32."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.batch import Batch
from lslm_jax.config import ModelConfig
from lslm_jax.config_checks import fill_sizes
from lslm_jax.models import attention, layers, presets
from lslm_jax.train import losses

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, D, H, C, L, T = 128, 48, 4, 12, 3, 20
B, S, LABELS = 2, 26, 5
SIZES = {"num_layers": L, "d_model": D, "num_heads": H, "vocab_size": V, "max_length": 32}
GPT = fill_sizes(ModelConfig(**SIZES))
LLAMA = replace(presets.LLAMA, **SIZES, num_kv_heads=2, d_ff=80)
LLAMA = fill_sizes(replace(LLAMA, dtype="float32", norm_eps=1e-6))
BERT = fill_sizes(replace(presets.BERT, **SIZES, d_ff=80, num_labels=LABELS))
ROBERTA = replace(BERT, norm_eps=1e-5, token_types=1)
T5_SIZES = {"num_decoder_layers": 2, "head_dim": 16, "d_ff": 80, "relative_buckets": 12, "relative_distance": 18}
T5 = fill_sizes(replace(presets.t5_small, **SIZES, **T5_SIZES))
T5_V1_1 = fill_sizes(replace(presets.t5_v1_1_small, **SIZES, **T5_SIZES))


def gpt2():
    settings = transformers.GPT2Config(
        vocab_size=V,
        n_positions=32,
        n_embd=D,
        n_layer=L,
        n_head=H,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(settings)


def llama():
    settings = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=80,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(settings)


BERT_SETTINGS = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 80,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert(kind, labels=LABELS):
    config = transformers.BertConfig(**BERT_SETTINGS, num_labels=labels, max_position_embeddings=32)
    return getattr(transformers, f"BertFor{kind}")(config)


def roberta(kind):
    # Its first position is 2, after that of padding.
    settings = {"max_position_embeddings": 34, "layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1}
    config = transformers.RobertaConfig(**BERT_SETTINGS, num_labels=LABELS, **settings)
    return getattr(transformers, f"RobertaFor{kind}")(config)


def t5(projection, tied):
    settings = transformers.T5Config(
        vocab_size=V,
        d_model=D,
        d_kv=16,
        d_ff=80,
        num_layers=L,
        num_decoder_layers=2,
        num_heads=H,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=18,
        dropout_rate=0.0,
        initializer_factor=0.5,  # as it is, outputs of T5 1.1 are large, and so is their rounding
        feed_forward_proj=projection,
        tie_word_embeddings=tied,
    )
    settings.tie_word_embeddings = tied  # which they took as whether to scale, and tie all tables or none
    model = transformers.T5ForConditionalGeneration(settings)
    model.set_input_embeddings(model.shared)
    return model


def gpt2_layer(tree, i):
    """One layer's arrays under our names: fused projections are cut apart, heads get an axis of their own."""
    at = lambda name: tree[f"transformer.h.{i}.{name}"]
    q, k, v = np.split(at("attn.c_attn.weight"), 3, axis=1)
    q_bias, k_bias, v_bias = np.split(at("attn.c_attn.bias"), 3)
    return {
        "attention_norm.scale": at("ln_1.weight"),
        "attention_norm.bias": at("ln_1.bias"),
        "attention.q.w": q.reshape(D, H, C),
        "attention.k.w": k.reshape(D, H, C),
        "attention.v.w": v.reshape(D, H, C),
        "attention.q.b": q_bias.reshape(H, C),
        "attention.k.b": k_bias.reshape(H, C),
        "attention.v.b": v_bias.reshape(H, C),
        "attention.o.w": at("attn.c_proj.weight").reshape(H, C, D),
        "attention.o.b": at("attn.c_proj.bias"),
        "mlp_norm.scale": at("ln_2.weight"),
        "mlp_norm.bias": at("ln_2.bias"),
        "mlp.up.w": at("mlp.c_fc.weight"),
        "mlp.up.b": at("mlp.c_fc.bias"),
        "mlp.down.w": at("mlp.c_proj.weight"),
        "mlp.down.b": at("mlp.c_proj.bias"),
    }


def llama_layer(tree, i):
    """As above; PyTorch's linear layers are transposed."""
    at = lambda name: tree[f"model.layers.{i}.{name}.weight"]
    return {
        "attention_norm.scale": at("input_layernorm"),
        "attention.q.w": at("self_attn.q_proj").T.reshape(D, H, C),
        "attention.k.w": at("self_attn.k_proj").T.reshape(D, 2, C),
        "attention.v.w": at("self_attn.v_proj").T.reshape(D, 2, C),
        "attention.o.w": at("self_attn.o_proj").T.reshape(H, C, D),
        "mlp_norm.scale": at("post_attention_layernorm"),
        "mlp.gate.w": at("mlp.gate_proj").T,
        "mlp.up.w": at("mlp.up_proj").T,
        "mlp.down.w": at("mlp.down_proj").T,
    }


def bert_layer(tree, i, name):
    at = lambda part: tree[f"{name}.encoder.layer.{i}.{part}"]
    ours = {}
    for short, long in [("q", "query"), ("k", "key"), ("v", "value")]:
        ours[f"attention.{short}.w"] = at(f"attention.self.{long}.weight").T.reshape(D, H, C)
        ours[f"attention.{short}.b"] = at(f"attention.self.{long}.bias").reshape(H, C)
    return ours | {
        "attention.o.w": at("attention.output.dense.weight").T.reshape(H, C, D),
        "attention.o.b": at("attention.output.dense.bias"),
        "attention_norm.scale": at("attention.output.LayerNorm.weight"),
        "attention_norm.bias": at("attention.output.LayerNorm.bias"),
        "mlp.up.w": at("intermediate.dense.weight").T,
        "mlp.up.b": at("intermediate.dense.bias"),
        "mlp.down.w": at("output.dense.weight").T,
        "mlp.down.b": at("output.dense.bias"),
        "mlp_norm.scale": at("output.LayerNorm.weight"),
        "mlp_norm.bias": at("output.LayerNorm.bias"),
    }


def t5_attention(tree, prefix, name, norm):
    at = lambda part: tree[f"{prefix}.{part}.weight"]
    return {
        f"{norm}.scale": at("layer_norm"),
        f"{name}.q.w": at(f"{ATTENTION[name]}.q").T.reshape(D, H, 16),
        f"{name}.k.w": at(f"{ATTENTION[name]}.k").T.reshape(D, H, 16),
        f"{name}.v.w": at(f"{ATTENTION[name]}.v").T.reshape(D, H, 16),
        f"{name}.o.w": at(f"{ATTENTION[name]}.o").T.reshape(H, 16, D),
    }


ATTENTION = {"attention": "SelfAttention", "cross": "EncDecAttention"}


def t5_layer(tree, i, stack):
    prefix = f"{stack}.block.{i}.layer"
    ours = t5_attention(tree, f"{prefix}.0", "attention", "attention_norm")
    if stack == "decoder":
        ours |= t5_attention(tree, f"{prefix}.1", "cross", "cross_norm")
    mlp = f"{prefix}.{2 if stack == 'decoder' else 1}"
    ours |= {
        "mlp_norm.scale": tree[f"{mlp}.layer_norm.weight"],
        "mlp.down.w": tree[f"{mlp}.DenseReluDense.wo.weight"].T,
    }
    theirs = {"up": "wi_1", "gate": "wi_0"} if f"{mlp}.DenseReluDense.wi_0.weight" in tree else {"up": "wi"}
    return ours | {f"mlp.{a}.w": tree[f"{mlp}.DenseReluDense.{b}.weight"].T for a, b in theirs.items()}


def stacked(tree, layer, name="blocks", num_layers=L):
    """Arrays of all layers under our names."""
    parts = [layer(tree, i) for i in range(num_layers)]
    return {f"{name}.{part}": np.stack([one[part] for one in parts]) for part in parts[0]}


def gpt2_names(tree):
    return stacked(tree, gpt2_layer) | {
        "embed": tree["transformer.wte.weight"],
        "positions": tree["transformer.wpe.weight"],
        "norm.scale": tree["transformer.ln_f.weight"],
        "norm.bias": tree["transformer.ln_f.bias"],
    }


def llama_names(tree):
    return stacked(tree, llama_layer) | {
        "embed": tree["model.embed_tokens.weight"],
        "norm.scale": tree["model.norm.weight"],
        "head": tree["lm_head.weight"],
    }


def bert_names(name, first_position=0, **top):
    """All arrays of a BERT called `name` in their tree, whose top's arrays are `top`, ours to theirs."""

    def names(tree):
        tables = {"embed": "word_embeddings.weight", "types": "token_type_embeddings.weight"}
        tables |= {"embed_norm.scale": "LayerNorm.weight", "embed_norm.bias": "LayerNorm.bias"}
        ours = {ours: tree[f"{name}.embeddings.{theirs}"] for ours, theirs in tables.items()}
        ours["positions"] = tree[f"{name}.embeddings.position_embeddings.weight"][first_position:]
        for part, theirs in top.items():
            turned = part.endswith("_w")
            ours[f"top.{part.replace('_', '.')}"] = tree[theirs].T if turned else tree[theirs]
        return stacked(tree, lambda tree, i: bert_layer(tree, i, name)) | ours

    return names


MASKED = {
    "dense_w": "transform.dense.weight",
    "dense_b": "transform.dense.bias",
    "norm_scale": "transform.LayerNorm.weight",
    "norm_bias": "transform.LayerNorm.bias",
    "bias": "bias",
}
BERT_MASKED = {ours: f"cls.predictions.{theirs}" for ours, theirs in MASKED.items()}
ROBERTA_MASKED = {
    ours: "lm_head." + theirs.replace("transform.", "").replace("LayerNorm", "layer_norm")
    for ours, theirs in MASKED.items()
}


def linear(name, **extra):
    return {"head": f"{name}.weight", "bias": f"{name}.bias"} | extra


def pooled(pooler, output):
    return linear(output, pooler_w=f"{pooler}.weight", pooler_b=f"{pooler}.bias")


def t5_names(tree):
    ours = {"embed": tree["shared.weight"]}
    for stack, num_layers in [("encoder", L), ("decoder", 2)]:
        ours |= stacked(tree, lambda tree, i, stack=stack: t5_layer(tree, i, stack), f"{stack}.blocks", num_layers)
        ours[f"{stack}.norm.scale"] = tree[f"{stack}.final_layer_norm.weight"]
        ours[f"{stack}.distances"] = tree[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    # Tied, theirs is the same parameter under another name.
    return (
        ours
        if np.array_equal(tree["lm_head.weight"], tree["shared.weight"])
        else ours | {"head": tree["lm_head.weight"]}
    )


def by_name(model):
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {".".join(part.name for part in path[:-1]): leaf for path, leaf in leaves}


class Case(NamedTuple):
    config: ModelConfig
    objective: str
    make: Callable[[], Any]
    names: Callable[[dict], dict]


CASES = {
    "gpt2": Case(GPT, "causal", gpt2, gpt2_names),
    "llama": Case(LLAMA, "causal", llama, llama_names),
    "bert-masked": Case(BERT, "masked", lambda: bert("MaskedLM"), bert_names("bert", **BERT_MASKED)),
    "bert-classification": Case(
        BERT,
        "classification",
        lambda: bert("SequenceClassification"),
        bert_names("bert", **pooled("bert.pooler.dense", "classifier")),
    ),
    "bert-tagging": Case(
        BERT, "tagging", lambda: bert("TokenClassification"), bert_names("bert", **linear("classifier"))
    ),
    "bert-qa": Case(BERT, "qa", lambda: bert("QuestionAnswering", 2), bert_names("bert", **linear("qa_outputs"))),
    "roberta-masked": Case(ROBERTA, "masked", lambda: roberta("MaskedLM"), bert_names("roberta", 2, **ROBERTA_MASKED)),
    "roberta-classification": Case(
        ROBERTA,
        "classification",
        lambda: roberta("SequenceClassification"),
        bert_names("roberta", 2, **pooled("classifier.dense", "classifier.out_proj")),
    ),
    "t5": Case(T5, "seq2seq", lambda: t5("relu", True), t5_names),
    "t5-v1.1": Case(T5_V1_1, "seq2seq", lambda: t5("gated-gelu", False), t5_names),
}


def example(case):
    """A batch for an objective; where models read it as a whole, with padding, which is token 1 (RoBERTa's)."""
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(2, V, (B, T))
    if case.config.family == "decoder":
        return Batch(tokens_BT, rng.integers(0, V, (B, T)), np.ones((B, T), np.float32))
    rows = np.arange(T)[None] < np.array([[T], [T - 6]])
    segments_BT = rows.astype(np.int32)
    if case.config.family == "encoder_decoder":
        source_segments_BS = (np.arange(S)[None] < np.array([[S - 5], [S]])).astype(np.int32)
        source_BS = np.where(source_segments_BS, rng.integers(2, V, (B, S)), 1)
        source = {"source_BS": source_BS, "source_segments_BS": source_segments_BS}
        targets_BT = rng.integers(0, V, (B, T))
        return Batch(tokens_BT, targets_BT, rows.astype(np.float32), segments_BT=segments_BT, **source)
    types_BT = np.where(rows & (np.arange(T)[None] > 8), 1, 0) % case.config.token_types
    whole = {"segments_BT": segments_BT, "types_BT": types_BT}
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
    if case.config.family == "encoder_decoder":
        sources = {"input_ids": tensor(batch.source_BS), "attention_mask": tensor(batch.source_segments_BS)}
        logits = theirs(**sources, decoder_input_ids=tensor(batch.tokens_BT)).logits
    elif case.config.family == "decoder":
        logits = theirs(tensor(batch.tokens_BT)).logits
    else:
        out = theirs(
            input_ids=tensor(batch.tokens_BT),
            attention_mask=tensor(batch.segments_BT),
            token_type_ids=tensor(batch.types_BT),
        )
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
        settings = losses.Settings(vocab_size=w_VD.shape[0], chunk=8)
        sums = losses.cross_entropy(x_BPD, w_VD, batch.targets_BT, batch.weights_BT, settings, b_V)
    logits_BPV = x_BPD @ w_VD.T
    return sums.objective / sums.weight, logits_BPV if b_V is None else logits_BPV + b_V[None, None]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_equal_those_of_transformers(case):
    torch.manual_seed(0)
    theirs = case.make().float().train()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = jax.eval_shape(lambda: presets.build(case.config, jax.random.key(0), case.objective))
    values = case.names({name: value.numpy() for name, value in theirs.state_dict().items()})
    assert {name: leaf.shape for name, leaf in by_name(model).items()} == {k: v.shape for k, v in values.items()}
    leaves = [jnp.asarray(values[name]) for name in by_name(model)]
    model = jax.tree.unflatten(jax.tree.structure(model), leaves)
    batch = example(case)

    expected, loss = their_outputs(theirs, case, batch)
    loss.backward()
    expected_gradients = case.names(
        {name: p.grad.numpy() for name, p in theirs.named_parameters(remove_duplicate=False)}
    )
    on_device = jax.tree.map(jnp.asarray, batch)
    gradient = jax.jit(jax.value_and_grad(lambda model: our_outputs(model, case, on_device), has_aux=True))
    (value, logits_BPV), gradients = gradient(model)

    counted = np.ones(logits_BPV.shape[:2], bool)
    if case.objective not in ("qa", "causal"):
        counted = batch.weights_BT > 0
    if case.objective == "qa":
        counted = batch.segments_BT > 0
    error = np.max(np.abs(logits_BPV - expected.detach().numpy())[counted])
    # Relative to the largest entry of all: some gradients, as those of the keys' biases, are nothing but rounding.
    largest = max(np.max(np.abs(gradient)) for gradient in expected_gradients.values())
    difference = {name: np.max(np.abs(leaf - expected_gradients[name])) for name, leaf in by_name(gradients).items()}
    name = max(difference, key=difference.get)
    worst = difference[name] / largest
    print(f"outputs differ by {error:.1e}, loss by {abs(value - loss.item()):.1e}, gradients by {worst:.1e} ({name})")
    assert error < 1e-5
    assert abs(value - loss.item()) < 1e-6
    assert worst < 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (12, 18), (64, 1000)])
def test_distances_fall_into_the_buckets_of_transformers(causal, buckets, farthest):
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    distance_TS = np.arange(700)[None, :] - np.arange(600)[:, None]
    expected_TS = bucket(torch.tensor(distance_TS), not causal, buckets, farthest).numpy()
    table_NH = jnp.arange(buckets, dtype=jnp.float32)[:, None]
    bias_HTS = layers.relative_bias(table_NH, 600, 700, 0, causal=causal, farthest=farthest)
    np.testing.assert_array_equal(bias_HTS[0], expected_TS)
