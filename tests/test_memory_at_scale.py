"""Peak memory of the engines at 7 billion parameters: their own code on fake tensors, which take no memory.

OLMo-2 7B with bf16 weights and a bf16 direction in memory, one sequence of 4096 tokens. Fake tensors on "cuda" need a
torch that was built with CUDA, so these are on the CPU, and the engines are told to go the ways of a GPU.
"""

import builtins
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import sharpkern
from sharpkern import head, linear, products
from sharpkern.engines import tail
from sharpkern.engines.batched import BatchedEngine
from sharpkern.engines.closure import Closure, LossFn
from sharpkern.engines.guards import preserved
from sharpkern.engines.precision import LossPrecision
from sharpkern.engines.ranks import Alone
from sharpkern.engines.table import make_pairs
from sharpkern.engines.virtual import VirtualEngine
from sharpkern.moves import Stored
from tests.memory import PeakBytes, bytes_of

GIB = 2**30
EIGHT = [1e-3 * k for k in range(1, 9)]
# The largest layer: one matrix of an MLP.
MLP_BYTES = 4096 * 11008 * 2

Loss = Callable[[], Tensor]


class Scene:
    """A language model, a direction and a batch, in bf16.

    Args:
        width: of the hidden states.
        hidden: of the MLP.
        heads: of the attention.
        vocabulary: entries.
        layers: how many.
        tokens: in the one sequence of the batch.
        fake: nothing has values.
    """

    def __init__(
        self, width: int, hidden: int, heads: int, vocabulary: int, *, layers: int, tokens: int, fake: bool
    ) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
        with self._mode:
            self.model = olmo2(
                hidden_size=width,
                intermediate_size=hidden,
                num_attention_heads=heads,
                vocab_size=vocabulary,
                num_hidden_layers=layers,
                max_position_embeddings=tokens,
            )
            self.tokens = torch.zeros(1, tokens, dtype=torch.int64)
            self.pairs = make_pairs((p, Stored(p, torch.zeros_like(p))) for p in self.model.parameters())

    def loss(self) -> Tensor:
        return self.model(input_ids=self.tokens, labels=self.tokens).loss

    def chunked_loss(self) -> Tensor:
        hidden = self.model.model(input_ids=self.tokens).last_hidden_state
        return sharpkern.linear_cross_entropy(hidden[:, :-1], self.model.lm_head.weight, self.tokens[:, 1:])

    def bytes_of_forward(self, loss: Loss) -> int:
        """Peak of a plain forward pass, above weights and direction."""
        with torch.no_grad():
            return self._peak(lambda loss_fn: loss_fn(), loss)

    def bytes_of_engine(
        self, engine: type[VirtualEngine], step_sizes: Sequence[float], chunk_size: int | None = None
    ) -> int:
        """Peak of an engine's losses, above weights and direction."""

        def losses(loss_fn: LossFn) -> None:
            with preserved(self.model) as guard:
                opened = engine(self.pairs, Closure(loss_fn, guard, LossPrecision(), Alone(no_number)))
                if chunk_size is not None:
                    opened.chunk_size = chunk_size
                opened.losses(step_sizes)

        return self._peak(losses, self.loss)

    def gib(self, above: int) -> float:
        """Peak above nothing, in GiB."""
        return (2 * bytes_of(self.model.parameters()) + above) / GIB

    def _peak(self, run: Callable[[LossFn], object], loss: Loss) -> int:
        counter = PeakBytes()

        def loss_fn() -> Tensor:
            # Around the closure alone, where everything large is: random states and step sizes stay real.
            with self._mode, counter:
                return loss()

        run(loss_fn)
        return counter.peak


def no_number(loss: Tensor) -> Tensor:
    """Stand in for a mean over ranks: fake losses have no value, and here real ones are of no interest."""
    return torch.zeros(())


def olmo2(**config: int) -> nn.Module:
    """A causal language model of transformers in bf16, all zeros, that attends without masks and keeps no cache."""
    transformers = pytest.importorskip("transformers", reason="the model is of transformers")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # The values of positions tell that a stock implementation needs no mask, and an implementation added gets none.
    transformers.AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    full = transformers.Olmo2Config(
        **config, attn_implementation="sdpa_without_mask", use_cache=False, pad_token_id=None, eos_token_id=None
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(full, dtype=torch.bfloat16).eval()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
    return model


@pytest.fixture(autouse=True)
def _fake_passes_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fake tensors lie nowhere: storages are told apart by what they are.
    monkeypatch.setattr(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)
    # Logits are deferred for plain tensors only.
    plain = lambda value: Tensor if isinstance(value, FakeTensor) else builtins.type(value)
    monkeypatch.setattr(tail, "type", plain, raising=False)
    # The one question about values, which is asked on a CPU only.
    monkeypatch.setattr(head, "_check_range", lambda task, vocabulary: None)


@pytest.fixture
def seven_billion(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scene]:
    """Takes the number of layers. Products of 16-bit matrices widen, and blocks of rows are as large, as on a GPU."""
    for module in (products, linear):
        monkeypatch.setattr(module, "widens", lambda device: True)
    monkeypatch.setattr(linear, "CACHE_BYTES", linear.SCRATCH_BYTES)
    return partial(Scene, 4096, 11008, 32, 100352, tokens=4096, fake=True)


def test_all_layers(seven_billion: Callable[..., Scene]) -> None:
    scene = seven_billion(layers=32)
    assert scene.gib(scene.bytes_of_forward(scene.loss)) == pytest.approx(31.05, abs=0.01)
    assert scene.gib(scene.bytes_of_forward(scene.chunked_loss)) == pytest.approx(27.60, abs=0.01)
    assert scene.gib(scene.bytes_of_engine(VirtualEngine, EIGHT[:1])) <= 27.7
    # Of few layers, which take a minute less: more of them take no more, as is shown below.
    assert scene.gib(seven_billion(layers=3).bytes_of_engine(BatchedEngine, EIGHT)) <= 30.5


def test_the_virtual_engine_forms_one_layer_at_a_time(seven_billion: Callable[..., Scene]) -> None:
    scene = seven_billion(layers=2)
    plain = scene.bytes_of_forward(scene.chunked_loss)
    assert scene.bytes_of_engine(VirtualEngine, EIGHT[:2]) <= 1.001 * (plain + MLP_BYTES)


# With few tokens formed weights would count for more than activations.
@pytest.mark.parametrize(("num_steps", "tokens"), [(1, 4096), (4, 4096), (8, 4096), (8, 256)])
def test_the_batched_engine_needs_activations_alone(
    seven_billion: Callable[..., Scene], num_steps: int, tokens: int
) -> None:
    scene = seven_billion(layers=2, tokens=tokens)
    plain = scene.bytes_of_forward(scene.chunked_loss)
    assert scene.bytes_of_engine(BatchedEngine, EIGHT[:num_steps]) <= 1.001 * num_steps * plain


def test_fewer_step_sizes_per_pass_take_less(seven_billion: Callable[..., Scene]) -> None:
    scene = seven_billion(layers=2)
    two, eight = (scene.bytes_of_engine(BatchedEngine, EIGHT, chunk_size) for chunk_size in (2, 8))
    assert 0.9 * eight < 4 * two < 1.1 * eight


@pytest.mark.parametrize("engine", [VirtualEngine, BatchedEngine])
def test_more_layers_take_no_more(seven_billion: Callable[..., Scene], engine: type[VirtualEngine]) -> None:
    two, four = (seven_billion(layers=layers).bytes_of_engine(engine, EIGHT[:2]) for layers in (2, 4))
    assert four <= 1.001 * two


@pytest.mark.parametrize("tokens", [16, 256])
@pytest.mark.parametrize("engine", [VirtualEngine, BatchedEngine])
def test_fake_tensors_take_what_real_ones_do(
    engine: type[VirtualEngine], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "HEAD_THRESHOLD", 0)
    fake, real = (
        Scene(64, 160, 4, 2048, layers=2, tokens=tokens, fake=fake).bytes_of_engine(engine, EIGHT[:4])
        for fake in (True, False)
    )
    assert fake == pytest.approx(real, rel=0.02)
