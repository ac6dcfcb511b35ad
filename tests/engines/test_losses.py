"""What a closure returns in place of a loss is told with the remedy that fits it, whichever function measures."""

import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import sharpkern

pytest.importorskip("transformers")
from transformers.modeling_outputs import CausalLMOutput

MODEL = nn.Linear(3, 2)
OUTPUTS = MODEL(torch.ones(4, 3))
LOSS = OUTPUTS.square().mean()

RETURNED: dict[str, tuple[object, str]] = {
    "nothing": (None, "got NoneType; end loss_fn with `return loss`"),
    "a float": (0.5, "got float 0.5; return the loss itself, without .item(), float() or .numpy()"),
    "a count": (3, "got int 3; return the loss itself, without .item()"),
    "a numpy scalar": (np.float32(0.5), "got float32 0.5; return the loss itself, without .item()"),
    "a numpy array": (np.array(0.5), "got ndarray 0.5; return the loss itself, without .item()"),
    "outputs of transformers": (CausalLMOutput(loss=LOSS, logits=OUTPUTS), "got CausalLMOutput; return outputs.loss"),
    "outputs without labels": (
        CausalLMOutput(logits=OUTPUTS),
        "got CausalLMOutput whose loss is None; pass labels to the model, and return outputs.loss",
    ),
    "an object with a loss": (SimpleNamespace(loss=LOSS), "got SimpleNamespace; return outputs.loss"),
    "a dictionary with a loss": ({"loss": LOSS, "logits": OUTPUTS}, "got dict; return outputs['loss']"),
    "a dictionary of losses": ({"ce": LOSS, "kl": LOSS}, "got dict of 'ce', 'kl'; return one loss that is computed"),
    "a loss and more": ((LOSS, OUTPUTS), "got tuple of 2; return the loss alone, outputs[0]"),
    "more and a loss": ([OUTPUTS, LOSS], "got list of 2; return the loss alone, outputs[1]"),
    "a list of losses": ([LOSS, LOSS, LOSS], "got list of 3; return one loss that is computed from them, such as"),
    "a list of outputs": ([OUTPUTS, OUTPUTS], "got list of 2; return one loss that is computed from them"),
    "a function": (lambda: LOSS, "got function; call it, and return what it returns"),
    "a criterion": (nn.MSELoss(), "got MSELoss; call it, and return what it returns"),
    "a text": ("loss", "got str; return the loss itself"),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_what_is_no_loss_is_told_with_the_remedy_that_fits(kind: str) -> None:
    returned, message = RETURNED[kind]
    closure: Callable[[], torch.Tensor] = lambda: returned
    direction = sharpkern.Direction.from_tensors({MODEL.weight: torch.ones(2, 3)}, MODEL)
    for measure in (
        lambda: sharpkern.critical_sharpness(MODEL, closure, direction),
        lambda: sharpkern.hessian_sharpness(MODEL, closure),
        lambda: sharpkern.gradient_direction(MODEL, [closure]),
    ):
        with pytest.raises(TypeError, match=re.escape(f"loss_fn must return a 0-dim floating-point tensor, {message}")):
            measure()
