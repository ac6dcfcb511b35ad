"""What each rank communicates in its first passes, told to all, so that one which fails can answer the others.

Of a model that was never measured nobody knows what its passes communicate. So each rank says in torch's key-value
store what it is about to do, and how much it was when its pass ends. A rank that failed reads it, and takes part with
zeros in everything that waits for it, until the passes of all others have ended.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

# Seconds without news of the others after which a rank that failed gives up answering them.
_PATIENCE = 300.0
_GROUP = "__torch__.torch.classes.c10d.ProcessGroup"


class Announced:
    """The operations of all ranks in the passes of one session."""

    def __init__(self, peers: Sequence[int], name: str) -> None:
        c10d: Any = torch.distributed.distributed_c10d
        self._store = c10d.PrefixStore(f"sharpkern/{name}", c10d._get_default_store())
        self._me = torch.distributed.get_rank()
        self._others = [rank for rank in peers if rank != self._me]
        self._pass = 0
        self._told: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Begin a pass."""
        self._pass += 1
        self._told = []

    def tell(self, func: Any, args: Any, kwargs: Any) -> None:
        """Say what is about to be done."""
        group = _group_of(func, args)
        if group is not None:
            entry = {"op": str(func), "group": group, "me": _rank_in(group), "args": _encoded([args, kwargs])}
            self._store.set(self._key(self._me, len(self._told)), json.dumps(entry))
            self._told.append(entry)

    def end(self) -> None:
        """Say that there is no more to come of this pass."""
        self._store.set(self._key(self._me, "all"), str(len(self._told)))

    def fail(self) -> bool:
        """Say that this pass has failed; whether it was the first to."""
        is_first: bool = self._store.add(f"{self._pass}/failed", 1) == 1
        self.end()
        return is_first

    @torch.no_grad()
    def answer(self) -> None:
        """Take part in what the others wait for, until their passes end."""
        done = Counter(key for entry in self._told for key in _keys_of(entry))
        heard: Counter[Any] = Counter()
        number = dict.fromkeys(self._others, 0)
        waiting: list[Any] = []
        end, pause = time.monotonic() + _PATIENCE, 1e-3
        while number and time.monotonic() < end:
            news = False
            for rank in list(number):
                while self._store.check([self._key(rank, number[rank])]):
                    entry = json.loads(self._store.get(self._key(rank, number[rank])))
                    number[rank] += 1
                    news = True
                    key = _answer_to(entry)
                    if key is None:
                        continue
                    heard[rank, key] += 1
                    if heard[rank, key] > done[key]:
                        done[key] += 1
                        with suppress(RuntimeError):
                            waiting.append(_begun(entry, key))
                ended = self._store.check([self._key(rank, "all")])
                if ended and int(self._store.get(self._key(rank, "all"))) == number[rank]:
                    del number[rank]
            if news:
                end, pause = time.monotonic() + _PATIENCE, 1e-3
            else:
                time.sleep(pause)
                pause = min(1.5 * pause, 0.02)
        for work in waiting:
            with suppress(RuntimeError):
                finish(work)

    def _key(self, rank: int, what: object) -> str:
        return f"{self._pass}/{rank}/{what}"


def finish(result: Any) -> None:
    """Wait for what an operation has begun, no longer than its group waits for anything."""
    for one in torch.utils._pytree.tree_iter(result):
        if isinstance(one, torch.ScriptObject):
            one = torch._C._distributed_c10d.Work.unbox(one)
        if isinstance(one, Tensor):
            torch.ops._c10d_functional.wait_tensor(one)
        elif hasattr(one, "wait"):
            one.wait()


def _group_of(func: Any, args: Any) -> str | None:
    """The name of the group that an operation is one of; None where it communicates nothing."""
    for one, spec in zip(args, func._schema.arguments, strict=False):
        if isinstance(one, torch.ScriptObject) and one._type().qualified_name() == _GROUP:
            return str(torch._C._distributed_c10d.ProcessGroup.unbox(one).group_name)
        if spec.name == "group_name":
            return str(one)
    return None


def _group(name: str) -> Any:
    c10d: Any = torch.distributed.distributed_c10d
    return c10d._resolve_process_group(name)


def _rank_in(group: str) -> int:
    return torch.distributed.get_rank(_group(group))


def _encoded(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"size": list(value.shape), "dtype": str(value.dtype).split(".")[1], "device": value.device.type}
    if isinstance(value, torch.ScriptObject):
        return {"group": value._type().qualified_name() == _GROUP}
    if isinstance(value, dict):
        return {"names": {name: _encoded(one) for name, one in value.items()}}
    return [_encoded(one) for one in value] if isinstance(value, (list, tuple)) else value


def _decoded(value: Any, group: str) -> Any:
    if isinstance(value, list):
        return [_decoded(one, group) for one in value]
    if not isinstance(value, dict):
        return value
    if "size" in value:
        return torch.zeros(value["size"], dtype=getattr(torch, value["dtype"]), device=value["device"])
    if "names" in value:
        return {name: _decoded(one, group) for name, one in value["names"].items()}
    return _group(group).boxed() if value["group"] else None


def _name_of(entry: dict[str, Any]) -> str:
    """The bare name of an operation."""
    return str(entry["op"]).split(".")[1]


def _keys_of(entry: dict[str, Any]) -> list[Any]:
    """What a rank has done by an operation of its own, as answers to it are counted."""
    name, (args, _) = _name_of(entry), entry["args"]
    if name in ("send", "recv_"):
        return [(name, entry["group"], args[2], args[3])]
    return [entry["group"]]


def _answer_to(entry: dict[str, Any]) -> Any:
    """What this rank has to do for an operation of another one; None where it is not meant."""
    try:
        own = _rank_in(entry["group"])
    except (RuntimeError, ValueError, LookupError):
        return None
    name, (args, _) = _name_of(entry), entry["args"]
    if own < 0:
        return None
    if name in ("send", "recv_"):
        return (
            ({"send": "recv_", "recv_": "send"}[name], entry["group"], entry["me"], args[3]) if args[2] == own else None
        )
    return entry["group"]


def _begun(entry: dict[str, Any], key: Any) -> Any:
    """Begin the part of this rank in an operation."""
    args, kwargs = _decoded(entry["args"], entry["group"])
    group, name = _group(entry["group"]), _name_of(entry)
    if isinstance(key, tuple):
        other, _, peer, tag = key
        return group.send(args[0], peer, tag) if other == "send" else group.recv(args[0], peer, tag)
    reduces = any(isinstance(one, dict) and one.get("group") is False for one in entry["args"][0])
    if reduces:
        # Which reduction it is does not matter, and no object of torch's stands for it here.
        tensors = [one for one in args if isinstance(one, (list, Tensor))]
        return getattr(group, name.removesuffix("_"))(*tensors)
    func = getattr(getattr(torch.ops, entry["op"].split(".")[0]), name).default
    return func(*args, **kwargs)
