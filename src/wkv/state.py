"""`State`: everything a recurrent model remembers of the tokens it has read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wkv.errors import CheckpointError, WkvError
from wkv.files import replacing

LayerState = dict[str, Tensor]


class State:
    """The memory of `batch_size` sequences: one dictionary of tensors per layer, every tensor batch-first.

    RWKV-5 to 7 keep per layer `att_shift` [B, C], `wkv` [B, H, N_value, N_key] (float32) and `ffn_shift` [B, C];
    RWKV-4 keeps `num`, `den`, `max` [B, A] (float32) in place of `wkv`. Attention keeps what it may still look at in
    slots whose names end in "cache" [B, S, H, N], the newest token last and zeros before a row's first; S grows with
    the tokens read.

    States are values: a model never changes the state it is given, it returns a new one.

    Args:
        model: registered name of the model the state belongs to, such as "rwkv7".
        layers: one dictionary per layer, tensors [B, ...] on one device.
    """

    def __init__(self, model: str, layers: Sequence[LayerState]) -> None:
        self.model = model
        self.layers = [dict(layer) for layer in layers]
        sizes = {tensor.shape[0] for _, _, tensor in self._tensors()}
        if len(sizes) != 1:
            raise WkvError(f"a state needs tensors of one batch size, found {sorted(sizes)}")

    def _tensors(self) -> Iterable[tuple[int, str, Tensor]]:
        return ((i, name, tensor) for i, layer in enumerate(self.layers) for name, tensor in layer.items())

    def _map(self, function: object) -> State:
        assert callable(function)
        return State(self.model, [{name: function(x) for name, x in layer.items()} for layer in self.layers])

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return next(tensor.shape[0] for _, _, tensor in self._tensors())

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(tensor.device for _, _, tensor in self._tensors())

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for _, _, tensor in self._tensors())

    def clone(self) -> State:
        """An independent copy."""
        return self._map(torch.clone)

    def detach(self) -> State:
        """The same values, cut off from the autograd graph."""
        return self._map(torch.detach)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        """Move or convert. `dtype` is for token shifts and caches; wkv states stay float32 (float64 if `dtype` is)."""

        def convert(name: str, tensor: Tensor) -> Tensor:
            if dtype is None or not tensor.is_floating_point():
                return tensor.to(device)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            return tensor.to(device, dtype if name.endswith(("shift", "cache")) else wide)

        return State(self.model, [{name: convert(name, x) for name, x in layer.items()} for layer in self.layers])

    def select(self, rows: int | slice | Sequence[int] | Tensor) -> State:
        """The state of some sequences: an index, a slice, a list, or an integer or bool tensor of rows."""
        if isinstance(rows, int):
            rows = [rows]
        if isinstance(rows, slice):
            rows = range(*rows.indices(self.batch_size))
        index = rows if isinstance(rows, Tensor) else torch.tensor(list(rows), dtype=torch.long)
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(-1)
        if index.numel() == 0 or not -self.batch_size <= int(index.min()) <= int(index.max()) < self.batch_size:
            raise WkvError(f"rows {index.tolist()} cannot be selected from a state of {self.batch_size} sequences")
        index = index.to(self.device) % self.batch_size
        return self._map(lambda tensor: tensor[index])

    @staticmethod
    def stack(states: Sequence[State]) -> State:
        """One state for all sequences of `states`, in order (concatenated along the batch)."""
        if not states:
            raise WkvError("State.stack needs at least one state")
        first = states[0]
        for other in states[1:]:
            check_compatible(other, first, first.device)
        return State(
            first.model,
            [
                {name: _concatenate(name, [s.layers[i][name] for s in states]) for name in layer}
                for i, layer in enumerate(first.layers)
            ],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to one safetensors file; the file appears only when it is complete.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        if not path.parent.is_dir():
            raise CheckpointError(f"{path} cannot be written: there is no folder {path.parent}")
        tensors = {f"{i}.{name}": tensor.detach().cpu().contiguous() for i, name, tensor in self._tensors()}
        header = {"wkv_state": json.dumps({"model": self.model, "layers": len(self.layers)})}
        try:
            with replacing([path]) as [temporary]:
                save_file(tensors, temporary, header)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error

    @staticmethod
    def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> State:
        """Read a file written by `save`.

        Raises:
            CheckpointError: if the file is missing, truncated, or not a state.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such state file")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = json.loads((file.metadata() or {}).get("wkv_state", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            layers: list[LayerState] = [{} for _ in range(header["layers"])]
            for key, tensor in tensors.items():
                index, name = key.split(".", 1)
                layers[int(index)][name] = tensor
            return State(header["model"], layers)
        except (SafetensorError, OSError, TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a state file written by State.save ({error})") from error

    def __repr__(self) -> str:
        layer = ", ".join(f"{name} {list(x.shape)}" for name, x in self.layers[0].items())
        return f"State({self.model!r}, {len(self.layers)} layers of {layer}; {self.num_bytes:,} bytes)"


def _concatenate(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Along the batch; shorter caches get zeros before their first token."""
    if name.endswith("cache"):
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [F.pad(tensor, (0, 0, 0, 0, longest - tensor.shape[1], 0)) for tensor in tensors]
    return torch.cat(list(tensors))


def check_compatible(
    state: State, template: State, device: torch.device | None = None, batch_size: int | None = None
) -> None:
    """Raise `WkvError` unless `state` has the model, layers and shapes of `template`, the device and the batch size."""
    if not isinstance(state, State):
        raise WkvError(f"state must be a wkv.State, found {type(state).__name__}; start with model.init_state(batch)")
    if state.model != template.model:
        raise WkvError(f"the state belongs to {state.model!r}, expected {template.model!r}")
    if len(state.layers) != len(template.layers):
        raise WkvError(f"the state has {len(state.layers)} layers, expected {len(template.layers)}")
    if batch_size is not None and state.batch_size != batch_size:
        raise WkvError(f"the state holds {state.batch_size} sequences, the tokens are a batch of {batch_size}")
    if device is not None and state.device != device:
        raise WkvError(f"the state is on {state.device}, expected {device}; move it with state.to(...)")
    for i, (found, expected) in enumerate(zip(state.layers, template.layers, strict=True)):
        if found.keys() != expected.keys():
            raise WkvError(f"layer {i} of the state has {sorted(found)}, expected {sorted(expected)}")
        for name in expected:
            grows = 2 if name.endswith("cache") else 1
            if found[name].shape[grows:] != expected[name].shape[grows:]:
                shapes = f"{list(found[name].shape[1:])}, expected {list(expected[name].shape[1:])}"
                raise WkvError(f"layer {i} of the state: {name} has shape [B, ...] with {shapes}")
