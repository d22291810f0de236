import pytest
from tiny_models import GPT, LLAMA, make_model

from lslm_jax.data.tokenizer import Bytes


@pytest.fixture(scope="session")
def gpt():
    """Learned positions, tied embeddings, layers scanned."""
    return make_model(GPT)


@pytest.fixture(scope="session")
def llama():
    """Rotary positions, a window shorter than the texts, grouped heads, layers unrolled."""
    return make_model(LLAMA)


@pytest.fixture(params=["gpt", "llama"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokenizer():
    return Bytes()
