"""The processes of a training run: which rows each of them has, what they agree on, and how they wait for each other.

A run does not depend on how many processes it has: they share out the rows of every batch, and everything that steers
the run is one number for all. One process never sends anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from wkv.data import Batch
from wkv.errors import DataError, RecipeError, WkvError
from wkv.evaluation.bits_per_byte import Text, scored_bytes
from wkv.state import State
from wkv.training.checkpoint import pack_state, unpack_state
from wkv.training.deepspeed import check_deepspeed, configure, uses_deepspeed
from wkv.training.sections import TrainRecipe

T = TypeVar("T")

# How long processes wait for one that reads the training text or measures the held-out one.
PATIENCE = timedelta(hours=3)


class Team:
    """The processes of a run.

    Process number r belongs to group r // line. Row b of group g is row b * groups + g of the whole batch; the
    processes of a group hold consecutive columns of its rows.

    Args:
        accelerator: an `accelerate.Accelerator`.
        line: processes per group, see `train.sequence_parallel`.

    Attributes:
        rank, size: number of this process, and of all.
        sharding: accelerate's options for FSDP2; None where every process has the whole model.
        deepspeed: whether DeepSpeed holds the optimizer.
        group: the processes of this one's group for `torch.distributed`; None if they are all there are.
    """

    def __init__(self, accelerator: Any, line: int = 1) -> None:
        self.accelerator, self.line = accelerator, line
        self.rank, self.size = int(accelerator.process_index), int(accelerator.num_processes)
        self.sharding, self.deepspeed = sharding_options(accelerator), uses_deepspeed(accelerator)
        self.group: dist.ProcessGroup | None = None
        if 1 < line < self.size:
            lines = [dist.new_group(list(range(first, first + line))) for first in range(0, self.size, line)]
            self.group = lines[self.rank // line]

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.size == 1

    @property
    def main(self) -> bool:
        """Whether this process prints, logs and writes."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters are divided between the processes (FSDP2)."""
        return self.sharding is not None

    @property
    def share(self) -> tuple[int, int]:
        """Number of this process's group, and of all groups: `rank` and `world_size` of a sampler."""
        return self.rank // self.line, self.size // self.line

    def rows(self, batch_size: int) -> int:
        """Rows of this process in a batch of `batch_size` rows."""
        return batch_size // self.share[1]

    def agree(self, sums: Sequence[float], mains: Sequence[float] = ()) -> tuple[list[float], list[float]]:
        """Sums over all processes, and numbers of the main process, in one message: the same on all processes."""
        if self.alone:
            return list(sums), list(mains)
        own = [*sums, *(mains if self.main else [0.0] * len(mains))]
        numbers = torch.tensor(own, dtype=torch.float64, device=self._message_device())
        dist.all_reduce(numbers)
        found = numbers.tolist()
        return found[: len(sums)], found[len(sums) :]

    def everyone(self, work: Callable[[], T]) -> T:
        """Let every process do `work`, and wait for all of them.

        Raises:
            Exception: what `work` raised here; `WkvError` if it failed on another process.
        """
        if self.alone:
            return work()
        result, error = _attempt(work)
        errors: list[str | None] = [None] * self.size
        dist.all_gather_object(errors, None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in enumerate(errors):
            if message is not None:
                raise WkvError(f"process {rank} of {self.size} failed: {message}")
        return result  # type: ignore[return-value]

    def main_alone(self, work: Callable[[], T]) -> T:
        """Let the main process do `work` and give its result, which must be picklable, to all.

        Raises:
            Exception: what `work` raised, on the main process; on the others `WkvError`.
        """
        if self.alone:
            return work()
        result, error = _attempt(work) if self.main else (None, None)
        message = [result, None if error is None else str(error)]
        dist.broadcast_object_list(message, src=0)
        if error is not None:
            raise error
        if message[1] is not None:
            raise WkvError(f"process 0 of {self.size} failed: {message[1]}")
        return message[0]  # type: ignore[return-value]

    def check_same(self, value: Any, what: str) -> None:
        """Raise `DataError` on all processes unless they have the same `value`; `what` it is, in words."""
        values = [value] * self.size
        if not self.alone:
            dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise DataError(f"process {rank} of {self.size} has another {what} than process 0; give all the same")

    def score(self, bits_per_byte: Callable[[Sequence[Text]], float], texts: Sequence[Text]) -> float:
        """Bits per byte of `texts`; processes that have the whole model measure some of them each."""
        if self.alone:
            return bits_per_byte(texts)
        if self.sharded:
            return self.agree([], [bits_per_byte(texts)])[1][0]
        own = texts[self.rank :: self.size]
        num_bytes = sum(map(scored_bytes, own))
        (bits, total), _ = self.agree([bits_per_byte(own) * num_bytes if num_bytes else 0.0, num_bytes])
        return bits / total

    @torch.no_grad()
    def spread(self, model: nn.Module) -> None:
        """Give every process the parameters of the main one: initial values may depend on the processor."""
        for parameter in model.parameters():
            message = parameter.detach().to(self._message_device())
            dist.broadcast(message, src=0)
            parameter.copy_(message)

    def columns(self, batch: Batch) -> Batch:
        """This process's columns of the rows that its group shares, after padding to a multiple of `line`."""
        if self.line == 1:
            return batch
        missing = -batch.inputs.shape[1] % self.line
        if missing:
            exists = torch.ones_like(batch.inputs, dtype=torch.bool) if batch.mask is None else batch.mask
            given = {name: x for name, x in {**vars(batch), "mask": exists}.items() if x is not None}
            batch = Batch(**{name: F.pad(x, (0, missing)) for name, x in given.items()})
        place = self.rank % self.line
        cut = {name: None if x is None else x.chunk(self.line, 1)[place] for name, x in vars(batch).items()}
        return Batch(**cut)  # type: ignore[arg-type]

    def own_rows(self, state: State | None) -> State | None:
        """This process's rows of a state of the whole batch."""
        group, groups = self.share
        return state if state is None or groups == 1 else state.select(slice(group, None, groups))

    def all_rows(self, state: State | None) -> State | None:
        """The rows of all processes in their order, on the main process; None on the others. All must call it."""
        groups = self.share[1]
        if state is None or groups == 1:
            return state
        packed = pack_state(state) if self.rank % self.line == 0 else None
        table: list[Any] = [None] * self.size
        dist.gather_object(packed, table if self.main else None, dst=0)
        states = [unpacked for one in table if (unpacked := unpack_state(one, torch.device("cpu"))) is not None]
        if not states:
            return None
        rows = torch.arange(groups * state.batch_size).view(groups, -1).T.flatten()
        return State.stack(states).select(rows)

    def leave(self) -> None:
        """End the connection between processes, if accelerate made it."""
        if not self.alone and getattr(self.accelerator, "owns_processes", False):
            self.accelerator.state.destroy_process_group()
            self.accelerator.state._reset_state(reset_partial_state=True)

    def _message_device(self) -> torch.device:
        return torch.device("cpu") if dist.get_backend() == "gloo" else torch.device(self.accelerator.device)


def create_team(recipe: TrainRecipe, run: Path) -> Team:
    """The processes that were started together for a run.

    Raises:
        RecipeError: on every process, if the recipe does not fit their number.
    """
    accelerator = create_accelerator(recipe, run)
    check_processes(recipe, int(accelerator.num_processes), sharding_options(accelerator) is not None)
    if uses_deepspeed(accelerator):
        check_deepspeed(recipe, accelerator.state.deepspeed_plugin.deepspeed_config)
        configure(accelerator, recipe, recipe.batch_size // int(accelerator.num_processes))
    return Team(accelerator, recipe.sequence_parallel)


def check_processes(recipe: TrainRecipe, size: int, sharded: bool = False) -> None:
    """Raise `RecipeError` unless `size` processes can share the rows and columns of a batch."""
    line = recipe.sequence_parallel
    if size % line:
        raise RecipeError(
            f"train.sequence_parallel: {line} processes share a row, found {size} in all; start a multiple of {line} "
            "(see accelerate launch)"
        )
    if recipe.batch_size % (size // line):
        raise RecipeError(
            f"train.batch_size ({recipe.batch_size}) is the number of rows over all processes and must be divisible by "
            f"{size // line}, found {size} processes" + (f" in groups of {line}" if line > 1 else "")
        )
    if line > 1 and sharded:
        raise RecipeError("train.sequence_parallel needs whole models, FSDP2 divides them; use the configuration ddp")


def resolve_precision(precision: str) -> str:
    """ "auto" made concrete: "bf16" on hardware with bfloat16 multiplication, else "fp32"."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Older versions of torch cannot tell.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def create_accelerator(recipe: TrainRecipe, run: Path) -> Any:
    """The `accelerate.Accelerator` of a run: precision, devices, processes, trackers."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, parse_flag_from_env

    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    precision = "bf16" if resolve_precision(recipe.precision) == "bf16" else "no"
    # Of several processes without an accelerator, accelerate would take each for the only one.
    cpu = launched_processes() > 1 and not torch.accelerator.is_available()
    connection = InitProcessGroupKwargs(timeout=PATIENCE, **({"backend": "gloo"} if cpu else {}))
    # FSDP2 does not see the gradient of a weight whose conversion autocast kept from an earlier segment.
    conversions = AutocastKwargs(cache_enabled=not parse_flag_from_env("ACCELERATE_USE_FSDP"))
    connected = dist.is_available() and dist.is_initialized()
    accelerator = Accelerator(
        mixed_precision=precision, log_with=list(recipe.trackers) or None, project_dir=str(run),
        cpu=cpu and not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"), kwargs_handlers=[connection, conversions],
    )  # fmt: skip
    accelerator.owns_processes = not connected
    if accelerator.num_processes != launched_processes() and launched_processes() > 1:
        raise WkvError(
            f"{launched_processes()} processes were started, and {accelerator.num_processes} found each other; start "
            "them with accelerate launch or torchrun"
        )
    return accelerator


def launched_processes() -> int:
    """How many processes the launcher (accelerate, torchrun, Ray) says it has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched_rank() -> int:
    """The number of this process among them; the main process is 0."""
    return int(os.environ.get("RANK", 0))


def sharding_options(accelerator: Any) -> Any:
    """accelerate's options for FSDP2, None without it.

    Raises:
        WkvError: for FSDP1.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env

    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    # accelerate knows FSDP on accelerators only; on the CPU the same launch configuration is read here.
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    version = getattr(plugin, "fsdp_version", 1)
    if version != 2:
        raise WkvError(f"FSDP version {version} is not supported; set fsdp_version: 2 (see fsdp2.yaml)")
    return plugin


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Result or error: others must hear of any error before it is raised."""
    try:
        return work(), None
    except Exception as error:
        return None, error
