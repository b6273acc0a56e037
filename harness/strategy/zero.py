"""ZeRO-1, 2 and 3: DeepSpeed partitions optimizer, gradients and weights over ranks; the arithmetic is that of DDP."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from harness.config.training import Clip, NormClip, ValueClip
from harness.ranks.group import Ranks
from harness.rows.tree import map_tree
from harness.state import GradNorm
from harness.strategy.average import WeightAverage
from harness.strategy.base import CLIP_EPSILON, Strategy, at_least_fp32, model_tensors, moments_by_parameter
from harness.strategy.zero_fragments import fragment_of, group_index, local_gradient, partitions, wait_for_offload


class ZeroStrategy(Strategy):
    """A DeepSpeed engine behind the seam.

    Args:
        engine: what `deepspeed.initialize` returned, built by Accelerate.
        stage: 1, 2 or 3.
    """

    tells_reduction = False  # DeepSpeed reduces within the backward pass

    def __init__(self, engine: Any, *, stage: int, ranks: Ranks, clip: Clip) -> None:
        super().__init__(rank=ranks.rank, world_size=ranks.world_size, device=ranks.device)
        self.model = engine
        self.module = engine.module
        self.optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
        self._engine, self._stage, self._clip = engine, stage, clip
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        self.parameter_names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._fragments = [fragment_of(p, engine.optimizer, stage=stage) for p in self._parameters]
        places = self.gather_objects([(piece.start, piece.numel) if piece else None for piece in self._fragments])
        self._places = list(zip(*places, strict=True))  # of each parameter, (start, numel) of each rank's piece
        # DeepSpeed averages over ranks; a loss that is world_size times as large makes that the sum.
        self._scale = float(self.world_size)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return map_tree(at_least_fp32, self.model(*args, **kwargs))  # the engine does its own autocast

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[object]:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # 0 * loss is 0 for a finite loss and NaN for any other.
        scale = self._scale if self.loss_scale is None else self.loss_scale.scale
        self._engine.backward(loss * (scale + 0 * loss.detach()), scale_wrt_gas=False)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        factor = self._unscaled()
        for name, parameter in zip(self.parameter_names, self._parameters, strict=True):
            gradient = safe_get_full_grad(parameter)
            yield name, gradient if factor is None else gradient * factor

    def update(self, learning_rate: Tensor, *, position: int) -> GradNorm:
        """Clip, step and zero. Reads the rate and whether the norm is finite to the host; DeepSpeed reads its norm."""
        wait_for_offload(self._engine.optimizer)
        pieces = self._local_gradients()
        factor = self._unscaled()
        if factor is not None:
            for piece in pieces:
                if piece is not None:
                    piece.mul_(factor)
        per_parameter = self._norms(pieces)  # (P,)
        norm = torch.linalg.vector_norm(per_parameter)
        coefficient = torch.ones_like(norm)
        match self._clip:
            case NormClip(max_norm=max_norm):  # the engine does the same with its own norm
                coefficient = torch.clamp(max_norm / (norm + CLIP_EPSILON), max=1.0)
            case ValueClip(max_value=max_value):
                for piece in pieces:
                    if piece is not None:
                        piece.clamp_(-max_value, max_value)
                coefficient = (torch.linalg.vector_norm(self._norms(pieces)) / norm).nan_to_num(nan=1.0)
        rate, applied = torch.stack([learning_rate.float(), norm.isfinite().float()]).tolist()
        if not applied:  # DeepSpeed's own norm may be finite where ours overflows; a NaN it skips under every stage
            for piece in pieces:
                if piece is not None:
                    piece.fill_(torch.nan)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        self._engine.step()
        assert bool(applied) != self._engine.optimizer.overflow, (
            f"the norm is {norm.item()}, DeepSpeed thought otherwise"
        )
        is_finite = norm.isfinite()
        if self.average is not None:
            self.average.update(is_finite)
        return GradNorm(norm, per_parameter, coefficient, is_finite, self._settle_scale(is_finite))

    def _local_gradients(self) -> list[Tensor | None]:
        pairs = zip(self._parameters, self._fragments, strict=True)
        return [
            None if fragment is None else local_gradient(parameter, fragment, stage=self._stage)
            for parameter, fragment in pairs
        ]

    def _norms(self, pieces: list[Tensor | None]) -> Tensor:
        """Return the (P,) 2-norms of whole gradients from this rank's pieces of them. Collective."""
        zero = torch.zeros((), device=self.device)
        norms = [zero if piece is None else piece.float().norm().to(self.device) for piece in pieces]
        squares = torch.stack(norms).double().square()  # the square of a large fp32 would overflow
        if self.world_size > 1:
            dist.all_reduce(squares)
        return squares.sqrt().float()

    def release(self) -> None:
        self._engine.empty_partition_cache()

    # -------------------------------------------------------- the average of the weights

    def keep_average(self, *, decay: float) -> None:
        """Average this rank's partitions of the weights."""
        self.average = WeightAverage(self._partitions(), decay=decay)

    def _show(self, *, average: bool) -> None:
        """Gather one parameter after the other from the pieces of all ranks, and write it. Collective."""
        held = self._averages() if average else {flat: flat for flat in self._partitions()}
        self.release()
        for index, parameter in enumerate(self._parameters):
            whole = self._gathered(index, held)
            with torch.no_grad(), self._whole(parameter, is_written=True):
                parameter.copy_(whole)

    def _averages(self) -> dict[Tensor, Tensor]:
        """Return what stands for each partition in the average."""
        assert self.average is not None, "there is no average to show"
        return dict(zip(self._partitions(), self.average.values, strict=True))

    def _partitions(self) -> list[Tensor]:
        return partitions(self._engine.optimizer, stage=self._stage)

    def _gathered(self, index: int, held: Mapping[Tensor, Tensor]) -> Tensor:
        """Return what all ranks hold of something that is cut up like parameter number `index`. Collective.

        Args:
            held: by partition of the weights, this rank's tensor that is laid out like it.
        """
        shape, fragment = self._shape(self._parameters[index]), self._fragments[index]
        whole = torch.empty(shape.numel(), dtype=self._partitions()[0].dtype, device=self.device)
        if fragment:
            whole.narrow(0, fragment.start, fragment.numel).copy_(fragment.piece_of(held[fragment.flat]))
        for owner, place in enumerate(self._places[index]):
            if place:
                dist.broadcast(whole.narrow(0, *place), src=owner)
        return whole.view(shape)

    # -------------------------------------------------------- state by parameter name

    def group_indices(self) -> list[int]:
        return [group_index(p, self._engine.optimizer, stage=self._stage) for p in self._parameters]

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model_tensors(self.module):
            with self._whole(tensor):
                whole = tensor.detach().clone()
            yield f"model/{name}", whole
        moments = self.optimizer.state.get(self._partitions()[0], {})
        for index, name in enumerate(self.parameter_names):
            for moment, value in moments.items():
                if value is None:
                    continue
                if value.dim() == 0:
                    yield f"optim/{name}/{moment}", value.clone()  # one for all parameters of a partition
                    continue
                held = {flat: self.optimizer.state[flat][moment] for flat in self._partitions()}
                yield f"optim/{name}/{moment}", self._gathered(index, held)
        if self.average is not None:
            averages = self._averages()
            yield "ema/count", self.average.count
            for index, name in enumerate(self.parameter_names):
                yield f"ema/weight/{name}", self._gathered(index, averages)

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in model_tensors(self.module):
            with self._whole(tensor, is_written=True):
                tensor.copy_(state[f"model/{name}"])
        self._engine.optimizer.refresh_fp32_params()
        keys = moments_by_parameter(state)
        # Every rank has every moment of every partition, also where it holds no piece of a parameter.
        some = {moment: state[key] for moment, key in next(iter(keys.values()), {}).items()}
        for flat in self._partitions():
            self.optimizer.state[flat] = {
                moment: torch.zeros_like(flat) if value.dim() else value.to(flat.device, copy=True)
                for moment, value in some.items()
            }
        for name, fragment in zip(self.parameter_names, self._fragments, strict=True):
            if fragment is None:
                continue
            for moment, key in keys.get(name, {}).items():
                if some[moment].dim():
                    fragment.take(state[key], into=self.optimizer.state[fragment.flat][moment])
        if self.average is not None:
            self.average.start_again()
            if "ema/count" in state:
                self.average.count.copy_(state["ema/count"])
                averages = self._averages()
                for name, fragment in zip(self.parameter_names, self._fragments, strict=True):
                    if fragment is not None:
                        fragment.take(state[f"ema/weight/{name}"], into=averages[fragment.flat])

    def model_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._shape(tensor)) for name, tensor in model_tensors(self.module)}

    def _shape(self, tensor: Tensor) -> torch.Size:
        return torch.Size(getattr(tensor, "ds_shape", tensor.shape))

    def _whole(self, tensor: Tensor, *, is_written: bool = False) -> AbstractContextManager[object]:
        """Have a partitioned weight whole on every rank inside, and partition it again at the end. Collective."""
        if not hasattr(tensor, "ds_tensor"):
            return nullcontext()
        gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
            [tensor], modifier_rank=0 if is_written else None
        )
        return gathered
