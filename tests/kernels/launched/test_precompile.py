"""After `sharpkern.precompile` measurements load no kernel any more."""

import pytest
import torch
import torch.nn.functional as F

import sharpkern
from sharpkern.directions import residence
from sharpkern.engines.virtual import lm_head
from tests.helpers.cases import tokens
from tests.helpers.launch_counts import forget_kernels
from tests.helpers.llama import TrainedLlama
from tests.helpers.models import GPT


def gpt():
    model = GPT(width=16, layers=2).eval()
    x = tokens(batch=2, length=16)
    return model, lambda: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


@pytest.mark.parametrize("engine", ["virtual", "batched", "inplace"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_a_gpt_of_any_optimizer(kind, engine, gpu, no_swapping):
    model, loss_fn = gpt()
    optimizer = kind(model.parameters(), lr=1e-3)
    forget_kernels()
    with gpu.counted() as compiled:
        assert sharpkern.precompile(model, optimizer) > 0
    assert compiled.refused == {}
    assert optimizer.state == {} or kind is torch.optim.Adagrad
    monitor = sharpkern.Monitor(model, optimizer, engine=engine)
    with gpu.counted() as counts:
        for _ in range(4):
            optimizer.zero_grad()
            loss_fn().backward()
            monitor(loss_fn)
            optimizer.step()
    assert counts.loaded == {}
    assert counts.launches.total() > 0


# Far out the loss of a model that has learned nothing is no smooth curve.
@pytest.mark.filterwarnings("ignore::sharpkern.SlopeMismatchWarning")
@pytest.mark.parametrize("free", [0, 2**40], ids=["from state", "kept in bf16"])
@pytest.mark.parametrize("engine", ["virtual", "batched", "inplace"])
def test_a_language_model_in_16_bits(engine, free, gpu, monkeypatch):
    pytest.importorskip("transformers", reason="the model is of transformers")
    monkeypatch.setattr(lm_head, "HEAD_THRESHOLD", 2**16)
    monkeypatch.setattr(residence, "free_bytes", lambda device: free)
    llama = TrainedLlama(2)
    states = {p: dict(state) for p, state in llama.optimizer.state.items()}
    forget_kernels()
    sharpkern.precompile(llama.model, llama.optimizer)
    assert llama.optimizer.state == states
    monitor = sharpkern.Monitor(llama.model, llama.optimizer, engine=engine)
    with gpu.counted() as counts:
        for _ in range(10):
            monitor(llama.loss)
    assert counts.loaded == {}
