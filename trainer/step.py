"""One optimizer step: from a batch of the loader to updated weights and a line of metrics.

1. Each micro-batch runs forward and backward; gradients are reduced over the ranks in the last backward,
   or with train.reduce=every in each.
2. The gradients of the routers are summed over the ranks. Then one all-reduce sums what all ranks must agree on: the
   gradient norm, the loss, the experts' loads, requests to stop.
3. Gradients are clipped, AdamW updates the weights, and the balance biases of the routers move.

The step marks its phases in `run.watchdog`, which can then name the rank that hangs, and those that wait for it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.loader import Batch, Step
from model.config import ModelConfig
from model.moe import Router
from model.precision import weights_unchanged
from model.random import sequence_keys, site_keys, stream_seed
from model.transformer import Output, Transformer
from parallel import collectives, fsdp, gradients
from parallel.experts import ExpertPlacement
from trainer.optimizer import learning_rate
from trainer.run import Run


@dataclass
class StepResult:
    fields: dict[str, Any]  # for metrics.jsonl
    stop: bool  # some rank was asked to stop
    requeue: bool  # some rank was asked to stop by its cluster, which is to start the run again
    ready: bool  # all ranks are ready for the next stage of the checkpoint that is being saved


@dataclass
class Totals:
    """Sums over all ranks."""

    loss: float  # mean over the targets of the global batch, in nats
    squared_norm: float  # of the gradients, which are multiplied by the loss scale
    loads: Tensor  # (MoE layers, E): real tokens that each expert received
    statistics: Tensor  # (MoE layers, 3), see `moe.router_statistics`
    stop_requests: int  # ranks that were asked to stop
    requeue_requests: int  # ranks that were asked to stop by their cluster
    ready_ranks: int  # ranks that are ready for the next stage of a checkpoint


def train_step(run: Run, batch: Step) -> StepResult:
    """One optimizer step. If the loss or the gradient is not finite, no rank changes weights, moments or biases."""
    with weights_unchanged():
        loss, loads, statistics = forward_backward(run, batch)
    run.watchdog.mark("all-reduce")
    totals = reduce_totals(run, loss, loads, statistics)
    run.watchdog.mark("optimizer")
    norm = math.sqrt(totals.squared_norm) / run.scale.value
    rate = learning_rate(run.config.train, run.step, run.steps)
    is_finite = math.isfinite(norm) and math.isfinite(totals.loss)
    if is_finite:
        run.skipped_steps = 0
        log_spike(run, totals.loss)
        update(run, norm, rate, totals.loads)
    else:
        skip(run, totals.loss, norm)
    run.scale.update(is_finite)
    run.optimizer.zero_grad()
    run.step += 1
    run.tokens += batch.real_tokens
    fields: dict[str, Any] = {"loss": totals.loss, "lr": rate, "grad_norm": norm}
    if len(totals.loads):
        fields |= expert_fields(run, totals.loads, totals.statistics, batch.real_tokens)
    return StepResult(
        fields, totals.stop_requests > 0, totals.requeue_requests > 0, totals.ready_ranks == run.world.size
    )


def forward_backward(run: Run, batch: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulates the gradients of the mean loss over the global batch, times the loss scale.

    Returns this rank's contribution to that loss (scalar), its loads (MoE layers, E) and its routers' statistics
    (MoE layers, 3). The loss is normalized only here: that of each micro-batch, which is a sum over its targets, is
    divided by the number of real tokens of all ranks.
    """
    config = run.config
    global_tokens = max(1, batch.real_tokens)
    loss = torch.zeros((), dtype=torch.float64, device=run.device)
    loads: Tensor | int = 0
    statistics: Tensor | int = 0
    if config.model.attention_dropout:
        # Fused attention takes no random keys, so its dropout is reproducible only on the same mesh.
        torch.manual_seed(stream_seed(f"{config.train.seed}/{run.step}/{run.world.rank}"))
    run.watchdog.mark("forward", run.step + 1)
    shares = load_shares(run, batch) if config.model.aux_loss_weight and config.model.moe_layers else None
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        is_last = number == len(batch.micro_batches)
        fsdp.set_gradient_sync(run.model, is_last or config.train.reduce == "every")
        run.watchdog.mark("forward")
        output = forward(run, micro_batch, shares)
        assert output.loss is not None
        run.watchdog.mark("backward")
        ((output.loss + output.penalty) * (run.scale.value / global_tokens)).backward()
        loss += output.loss.detach().double() / global_tokens
        loads = loads + output.loads
        statistics = statistics + output.statistics.detach().double()
    assert isinstance(loads, Tensor) and isinstance(statistics, Tensor)
    return loss, loads, statistics


def forward(run: Run, micro_batch: Batch, shares: Tensor | None = None) -> Output:
    """The model's output on a micro-batch of this step; `shares` (MoE layers, E) as from `load_shares`."""
    batch = micro_batch.to(run.device)
    config = run.config.model
    keys = None
    if config.dropout > 0 or config.noisy_top_k:
        # computed on the CPU, because the launches of kernels would cost more than these few numbers
        keys = site_keys(sequence_keys(run.config.train.seed, run.step, micro_batch.index), config.n_layers)
        keys = to_device(keys, run.device)
    return run.model(batch.tokens, batch.targets, batch.positions, batch.documents, keys, load_shares=shares)


@torch.no_grad()
def load_shares(run: Run, batch: Step) -> Tensor:
    """(MoE layers, E): each expert's share of the load of this step's global batch.

    The auxiliary loss of each micro-batch needs the shares of the whole global batch, which are known only when every
    micro-batch of every rank has been routed. So all of them run forward once more, before the first backward. With
    model.attention_dropout this forward draws other random numbers than the one with gradients, so that its shares can
    differ slightly from those of the forward with gradients.
    """
    loads = sum(forward(run, micro_batch).loads for micro_batch in batch.micro_batches)
    assert isinstance(loads, Tensor)
    (total,) = collectives.sum_over_ranks(loads.to(run.device))
    return (total / total.sum(1, keepdim=True).clamp(min=1)).float().to(run.device)


def reduce_totals(run: Run, loss: Tensor, loads: Tensor, statistics: Tensor) -> Totals:
    """Sums the router gradients in place, then all totals in one all-reduce.

    The totals are what `forward_backward` returned, the gradient norm and the requests.
    """
    gradients.sum_replicated(run.model)
    squared_norm = gradients.sum_of_squares(run.model, run.config.parallel.replicate)
    is_ready = run.saver is not None and run.saver.ready
    requests = torch.tensor([run.stop.requested, run.stop.requeue, is_ready])
    total_norm, total_loss, total_loads, total_statistics, total_requests = collectives.sum_over_ranks(
        squared_norm.to(run.device),
        loss,
        loads.to(run.device),
        statistics.to(run.device),
        to_device(requests, run.device),
    )
    stop_requests, requeue_requests, ready_ranks = (int(count) for count in total_requests)
    return Totals(
        loss=float(total_loss),
        squared_norm=float(total_norm),
        loads=total_loads,
        statistics=total_statistics,
        stop_requests=stop_requests,
        requeue_requests=requeue_requests,
        ready_ranks=ready_ranks,
    )


def update(run: Run, norm: float, rate: float, loads: Tensor) -> None:
    """Clip the gradients, let AdamW update the weights, and move the balance biases; loads (MoE layers, E)."""
    config = run.config
    clip = min(1.0, config.train.clip / (norm + 1e-6)) if config.train.clip > 0 else 1.0
    gradients.scale(gradients.local_gradients(run.model), clip / run.scale.value)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    if run.saver is not None:
        run.saver.wait_for_staging()
    run.optimizer.step()
    if run.step < first_fading_step(config.model, run.steps):
        move_biases(run.model, loads, config.model.balance_rate)
    else:
        fade_biases(run.model, run.step, run.steps)


def skip(run: Run, loss: float, norm: float) -> None:
    """Log and count a skipped step, which changes nothing because its loss or its gradient is not finite.

    While fp16 searches for the largest loss scale that works, infinite gradients are expected and do not count.
    """
    if run.scale.can_fall and math.isfinite(loss):
        run.reporter.event(run.step + 1, "loss scale", was=run.scale.value)
        return
    run.skipped_steps += 1
    run.reporter.event(run.step + 1, "skipped", loss=str(loss), grad_norm=str(norm))
    run.reporter.log(f"step {run.step + 1}: loss {loss}, gradient norm {norm}: skipped on all ranks")


def log_spike(run: Run, loss: float) -> None:
    """Log a jump of the loss. Nothing else is done about it."""
    median = run.spikes.median_if_spike(loss)
    if median is not None:
        run.reporter.event(run.step + 1, "spike", loss=loss, usual=median)
        run.reporter.log(f"step {run.step + 1}: loss spike: {loss:.3f}, after a median of {median:.3f}")


@torch.no_grad()
def move_biases(model: Transformer, loads: Tensor, rate: float) -> None:
    """bias += rate * sign(mean load - load) for each expert (arXiv:2408.15664, algorithm 1); loads (MoE layers, E)."""
    if rate == 0:
        return
    biases = [module.bias for module in model.modules() if isinstance(module, Router)]
    if not biases:
        return
    directions = torch.sign(loads.sum(1, keepdim=True) - loads * loads.shape[1])
    torch._foreach_add_(biases, list(to_device(directions.to(biases[0].dtype), biases[0].device)), alpha=rate)


def first_fading_step(config: ModelConfig, steps: int) -> int:
    """The first step (from 0) of a run of `steps` steps in which the biases fade, and no longer balance the load."""
    return steps if config.balance_until is None else int(config.balance_until * steps)


@torch.no_grad()
def fade_biases(model: Transformer, step: int, steps: int) -> None:
    """Move the biases linearly to zero, which they reach in the last step; `step` (from 0) of `steps` steps."""
    for module in model.modules():
        if isinstance(module, Router):
            module.bias *= (steps - step - 1) / (steps - step)


def expert_fields(run: Run, loads: Tensor, statistics: Tensor, real_tokens: int) -> dict[str, Any]:
    """Fields of metrics.jsonl about the experts: loads (MoE layers, E) and statistics (MoE layers, 3) over all ranks.

    expert_load_max and rank_load_max are the busiest expert's and rank's load over the mean, in the worst layer; the
    entropy (nats) and the losses are means over tokens and layers.
    """
    config = run.config.model
    loads_of_ranks = ExpertPlacement(config.n_experts, run.degrees.expert).by_rank(loads).sum(-1)
    entropy, z_loss, aux_loss = (statistics.mean(0) / max(1, real_tokens)).tolist()
    fields: dict[str, Any] = {
        "expert_load_max": max_over_mean(loads),
        "rank_load_max": max_over_mean(loads_of_ranks),
        "idle_experts": int((loads == 0).sum()),
        "router_entropy": entropy,
    }
    if config.z_loss_weight:
        fields["z_loss"] = z_loss
    if config.aux_loss_weight:
        fields["aux_loss"] = aux_loss
    if run.step % run.config.log.every == 0:
        fields["expert_loads"] = loads.long().tolist()
    return fields


def max_over_mean(loads: Tensor) -> float:
    """The largest load over the mean load, in the layer where this is largest; loads (layers, experts or ranks)."""
    return float((loads.amax(1) / loads.mean(1).clamp(min=1e-9)).max())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`; the host does not wait for the copy."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
