import pytest
from tiny_models import GPT, LLAMA, T5, TRANSFORMER, make_model

from lslm_jax.data.tokenizers.bytes import Bytes


@pytest.fixture(scope="session")
def gpt():
    """Learned positions, tied embeddings, layers scanned."""
    return make_model(GPT)


@pytest.fixture(scope="session")
def llama():
    """Rotary positions, a window shorter than the texts, grouped heads, layers unrolled."""
    return make_model(LLAMA)


@pytest.fixture(scope="session")
def transformer():
    """Encoder and decoder, normalised after each sub-layer, layers scanned."""
    return make_model(TRANSFORMER)


@pytest.fixture(scope="session")
def t5():
    """Encoder and a deeper decoder, relative positions, grouped heads, layers unrolled."""
    return make_model(T5)


@pytest.fixture(params=["gpt", "llama"])
def decoder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["gpt", "llama", "transformer", "t5"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokenizer():
    return Bytes()
