"""The random streams a computation may draw from, noted so that they can be put back."""

import pickle
import random
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def note_streams(devices: Iterable[torch.device]) -> list[Callable[[], None]]:
    """Note the streams of Python, NumPy and torch."""
    python, cpu = random.getstate(), torch.get_rng_state()
    undo = [lambda: random.setstate(python), lambda: torch.set_rng_state(cpu)]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        # The global stream is the one that user code draws from.
        legacy = numpy.random.get_state()
        undo.append(lambda: numpy.random.set_state(legacy))
    undo.extend(_note_device(device) for device in set(devices) if device.type not in ("cpu", "meta"))
    return undo


class Streams:
    """The streams of Python, NumPy, torch on the CPU and on every GPU in use, as they are when it is made."""

    def __init__(self) -> None:
        used = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._undo = note_streams(torch.device("cuda", k) for k in range(torch.cuda.device_count() if used else 0))

    def put_back(self) -> None:
        """Make the streams what they were."""
        for undo in self._undo:
            undo()


def seed_streams(seed: str, devices: Iterable[torch.device], generators: Iterable[Any] = ()) -> None:
    """Seed the streams that `note_streams` notes and some generators, and no other."""
    random.seed(seed)
    number = random.Random(seed).getrandbits(32)
    torch.default_generator.manual_seed(number)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number)
    for device in set(devices):
        if device.type not in ("cpu", "meta"):
            accelerator = torch.get_device_module(device)
            with accelerator.device(device):
                accelerator.manual_seed(number)
    for generator in generators:
        if isinstance(generator, torch.Generator):
            generator.manual_seed(number)
        elif isinstance(generator, random.Random):
            generator.seed(seed)
        else:
            generator.bit_generator.state = type(generator.bit_generator)(number).state


def torch_states(devices: Iterable[torch.device]) -> list[Tensor]:
    """State of torch's streams: the CPU's, then those of the devices in their order."""
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    return [torch.get_rng_state(), *(torch.get_device_module(device).get_rng_state(device) for device in accelerators)]


def stream_states(devices: Iterable[torch.device], generators: Iterable[Any] = ()) -> list[object]:
    """State of all random streams that `note_streams` notes, and of some generators."""
    states: list[object] = [state.numpy().tobytes() for state in torch_states(devices)]
    states.append(random.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, key, *position = numpy.random.get_state()
        states.append((kind, key.tobytes(), position))
    for generator in generators:
        if isinstance(generator, torch.Generator):
            states.append(generator.get_state().numpy().tobytes())
        elif isinstance(generator, random.Random):
            states.append(generator.getstate())
        else:
            states.append(pickle.dumps(generator.bit_generator.state))
    return states


def note_generators(objects: Iterable[object]) -> list[Callable[[], object]]:
    """Note the state of every random generator among some objects."""
    undo: list[Callable[[], object]] = []
    for thing in objects:
        if isinstance(thing, torch.Generator):
            undo.append(partial(thing.set_state, thing.get_state()))
        elif isinstance(thing, random.Random):
            undo.append(partial(thing.setstate, thing.getstate()))
        elif type(thing).__module__.startswith("numpy.random") and hasattr(thing, "bit_generator"):
            bits = thing.bit_generator
            undo.append(partial(setattr, bits, "state", bits.state))
    return undo


def _note_device(device: torch.device) -> Callable[[], None]:
    accelerator = torch.get_device_module(device)
    state = accelerator.get_rng_state(device)
    return lambda: accelerator.set_rng_state(state, device)
