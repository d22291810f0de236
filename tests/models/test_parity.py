"""The same weights give the same logits and gradients as in Hugging Face transformers, in float32."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import ModelConfig
from lslm_jax.config_checks import fill_sizes
from lslm_jax.models import presets
from lslm_jax.models.decoder import Decoder
from lslm_jax.train import losses

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, D, H, C, L, T = 128, 48, 4, 12, 3, 20
GPT = fill_sizes(ModelConfig(num_layers=L, d_model=D, num_heads=H, vocab_size=V, max_length=32))
LLAMA = replace(presets.LLAMA, num_layers=L, d_model=D, num_heads=H, num_kv_heads=2, d_ff=80, vocab_size=V)
LLAMA = fill_sizes(replace(LLAMA, max_length=32, dtype="float32", norm_eps=1e-6))


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


def gpt2_rest(tree):
    return {
        "embed": tree["transformer.wte.weight"],
        "positions": tree["transformer.wpe.weight"],
        "norm.scale": tree["transformer.ln_f.weight"],
        "norm.bias": tree["transformer.ln_f.bias"],
    }


def llama_rest(tree):
    return {
        "embed": tree["model.embed_tokens.weight"],
        "norm.scale": tree["model.norm.weight"],
        "head": tree["lm_head.weight"],
    }


def ours(tree, layer, rest):
    """Arrays of theirs under our names, layers stacked."""
    layers = [layer(tree, i) for i in range(L)]
    stacked = {f"blocks.{name}": np.stack([one[name] for one in layers]) for name in layers[0]}
    return stacked | rest(tree)


def by_name(model):
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {".".join(part.name for part in path[:-1]): leaf for path, leaf in leaves}


@pytest.mark.parametrize(
    ("config", "make", "layer", "rest"),
    [(GPT, gpt2, gpt2_layer, gpt2_rest), (LLAMA, llama, llama_layer, llama_rest)],
    ids=["gpt2", "llama"],
)
def test_logits_and_gradients_equal_those_of_transformers(config, make, layer, rest):
    torch.manual_seed(0)
    theirs = make().float().train()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = Decoder(config, jax.random.key(0))
    values = ours({name: value.numpy() for name, value in theirs.state_dict().items()}, layer, rest)
    assert {name: leaf.shape for name, leaf in by_name(model).items()} == {k: v.shape for k, v in values.items()}
    leaves = [jnp.asarray(values[name]) for name in by_name(model)]
    model = jax.tree.unflatten(jax.tree.structure(model), leaves)

    tokens_BT = np.random.default_rng(0).integers(0, V, (2, T + 1))
    expected = theirs(torch.tensor(tokens_BT[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(expected.reshape(-1, V), torch.tensor(tokens_BT[:, 1:]).reshape(-1))
    loss.backward()
    expected_gradients = ours(
        {name: p.grad.numpy() for name, p in theirs.named_parameters()},
        layer,
        rest,
    )

    @jax.jit
    @jax.value_and_grad
    def ours_loss(model):
        sums = losses.cross_entropy(
            model(jnp.asarray(tokens_BT[:, :-1])),
            model.output_weights(),
            jnp.asarray(tokens_BT[:, 1:]),
            jnp.ones((2, T)),
            losses.Settings(vocab_size=V, chunk=8),
        )
        return sums.objective / sums.weight

    logits_BTV = jax.jit(lambda model, tokens: model.logits(model(tokens)))(model, jnp.asarray(tokens_BT[:, :-1]))
    value, gradients = ours_loss(model)
    error = np.max(np.abs(logits_BTV - expected.detach().numpy()))
    # Relative to the largest entry of all: some gradients, as those of the keys' biases, are nothing but rounding.
    largest = max(np.max(np.abs(gradient)) for gradient in expected_gradients.values())
    difference = {name: np.max(np.abs(leaf - expected_gradients[name])) for name, leaf in by_name(gradients).items()}
    name = max(difference, key=difference.get)
    worst = difference[name] / largest
    print(f"logits differ by {error:.1e}, loss by {abs(value - loss.item()):.1e}, gradients by {worst:.1e} ({name})")
    assert error < 1e-5
    assert abs(value - loss.item()) < 1e-6
    assert worst < 1e-5
