"""One optimizer step.

The loader's micro-batches go forward and backward, and gradients are reduced on the last one. One message sums norm,
loss, loads and the request to stop over all ranks. Then come the clip, AdamW, the balance bias and the metrics. The
step marks its phases in `run.watchdog`, so that a rank that hangs can be told from those that wait for it.
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
from model.random import place_seed, sequence_keys, site_keys
from model.transformer import Output, Transformer
from parallel import collectives, fsdp, gradients
from parallel.experts import ExpertPlacement
from trainer.optimizer import learning_rate
from trainer.run import Run


@dataclass
class StepResult:
    fields: dict[str, Any]  # for metrics.jsonl
    stop: bool  # some rank was asked to stop
    requeue: bool  # and by its cluster
    ready: bool  # on all ranks the checkpoint that is under way can be taken a step on


def train_step(run: Run, batch: Step) -> StepResult:
    """One optimizer step. A step without a finite loss and gradient moves nothing, on all ranks together."""
    config, model = run.config.train, run.model
    with weights_unchanged():
        loss, loads, statistics = backward(run, batch)
    run.watchdog.mark("the step's message")
    gradients.sum_replicated(model)
    parts = gradients.local_gradients(model)
    square = gradients.sum_of_squares(model, run.config.parallel.replicate)
    ready_here = run.saver is not None and run.saver.ready
    said = to_device(torch.tensor([run.stop.asked, run.stop.requeue, ready_here]), run.device)
    total_square, total_loss, total_loads, total_statistics, (stops, requeues, ready) = collectives.sum_over_ranks(
        square.to(run.device), loss, loads.to(run.device), statistics.to(run.device), said
    )
    run.watchdog.mark("optimizer")
    norm, mean_loss = math.sqrt(float(total_square)) / run.scale.value, float(total_loss)
    rate = learning_rate(config, run.step, run.steps)
    finite = math.isfinite(norm) and math.isfinite(mean_loss)
    if finite:
        run.skipped = 0
        report_spike(run, mean_loss)
        clip = min(1.0, config.clip / (norm + 1e-6)) if config.clip > 0 else 1.0
        gradients.scale(parts, clip / run.scale.value)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        if run.saver is not None:
            run.saver.wait_for_staging()
        run.optimizer.step()
        if run.step < fading_from(run.config.model, run.steps):
            move_biases(model, total_loads, run.config.model.balance_rate)
        else:
            fade_biases(model, run.step, run.steps)
    elif run.scale.can_fall and math.isfinite(mean_loss):
        run.reporter.event(run.step + 1, "loss scale", was=run.scale.value)  # looking for the largest is no fault
    else:
        run.skipped += 1
        run.reporter.event(run.step + 1, "skipped", loss=str(mean_loss), grad_norm=str(norm))
        run.reporter.log(f"step {run.step + 1}: loss {mean_loss}, gradient norm {norm}: skipped on all ranks")
    run.scale.update(finite)
    run.optimizer.zero_grad()
    run.step += 1
    run.tokens += batch.real_tokens
    fields = {"loss": mean_loss, "lr": rate, "grad_norm": norm}
    if len(total_loads):
        fields |= expert_fields(run, total_loads, total_statistics, batch.real_tokens)
    return StepResult(fields, float(stops) > 0, float(requeues) > 0, int(ready) == run.world.size)


def report_spike(run: Run, loss: float) -> None:
    """Say so when the loss jumps; nothing else is done about it."""
    if (usual := run.spikes.usual(loss)) is not None:
        run.reporter.event(run.step + 1, "spike", loss=loss, usual=usual)
        run.reporter.log(f"step {run.step + 1}: loss {loss:.3f} jumps above the usual {usual:.3f}")


def backward(run: Run, batch: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the mean loss over the global batch, times the loss scale.

    Returns this rank's share of the loss, its loads and its routers' statistics. The one place that divides: each
    micro-batch's sum by the count of real tokens over all ranks.
    """
    config, real = run.config, max(1, batch.real_tokens)
    loss = torch.zeros((), dtype=torch.float64, device=run.device)
    loads: Tensor | int = 0
    statistics: Tensor | int = 0
    if config.model.attention_dropout:  # fused attention takes no keys: the same on the same mesh only
        torch.manual_seed(place_seed(f"{config.train.seed}/{run.step}/{run.world.rank}"))
    run.watchdog.mark("forward", run.step + 1)
    shares = load_shares(run, batch) if config.model.aux_loss_weight and config.model.moe_layers else None
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        last = number == len(batch.micro_batches)
        fsdp.reduce_gradients(run.model, last or config.train.reduce == "every")
        run.watchdog.mark("forward")
        output = forward(run, micro_batch, shares)
        assert output.loss is not None
        run.watchdog.mark("backward")
        ((output.loss + output.penalty) * (run.scale.value / real)).backward()
        loss += output.loss.detach().double() / real
        loads = loads + output.loads
        statistics = statistics + output.statistics.detach().double()
    assert isinstance(loads, Tensor) and isinstance(statistics, Tensor)
    return loss, loads, statistics


def forward(run: Run, micro_batch: Batch, shares: Tensor | None = None) -> Output:
    """The model on a micro-batch of this step, with the step's random numbers."""
    b, model = micro_batch.to(run.device), run.config.model
    random = model.dropout > 0 or model.noisy_top_k
    keys = None
    if random:  # made on the CPU, where so few numbers cost less than the launches of their operations
        keys = site_keys(sequence_keys(run.config.train.seed, run.step, micro_batch.index), model.n_layers)
        keys = to_device(keys, run.device)
    return run.model(b.tokens, b.targets, b.positions, b.documents, keys, load_shares=shares)


@torch.no_grad()
def load_shares(run: Run, batch: Step) -> Tensor:
    """(layers, E): each expert's share of the load of this step's global batch.

    It is known only when all micro-batches of all ranks were routed, and the auxiliary loss wants it before: so they
    are run forward once more, ahead.
    """
    loads = sum(forward(run, micro_batch).loads for micro_batch in batch.micro_batches)
    assert isinstance(loads, Tensor)
    (total,) = collectives.sum_over_ranks(loads.to(run.device))
    return (total / total.sum(1, keepdim=True).clamp(min=1)).float().to(run.device)


@torch.no_grad()
def move_biases(model: Transformer, loads: Tensor, rate: float) -> None:
    """bias += rate * sign(mean load - load) for each expert (arXiv:2408.15664, algorithm 1); loads (layers, E)."""
    if rate == 0:
        return
    biases = [module.bias for module in model.modules() if isinstance(module, Router)]
    if not biases:
        return
    directions = torch.sign(loads.sum(1, keepdim=True) - loads * loads.shape[1])
    torch._foreach_add_(biases, list(to_device(directions.to(biases[0].dtype), biases[0].device)), alpha=rate)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`; the host does not wait for the copy."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def fading_from(config: ModelConfig, steps: int) -> int:
    """The first step (from 0) that moves the biases towards zero instead of balancing, of a run of `steps`."""
    return steps if config.balance_until is None else int(config.balance_until * steps)


@torch.no_grad()
def fade_biases(model: Transformer, step: int, steps: int) -> None:
    """Straight towards zero, where the biases are after the last step; `step` (from 0) of `steps`."""
    for module in model.modules():
        if isinstance(module, Router):
            module.bias *= (steps - step - 1) / (steps - step)


def expert_fields(run: Run, loads: Tensor, statistics: Tensor, real_tokens: int) -> dict[str, Any]:
    """How the experts of a step were used: loads (layers, E) and statistics (layers, 3) over all ranks.

    expert_load_max and rank_load_max are the busiest expert's and rank's load over the mean, of the worst layer; the
    entropy (nats) and the losses are means over tokens and layers.
    """

    def busiest(load: Tensor) -> float:
        return float((load.amax(1) / load.mean(1).clamp(min=1e-9)).max())

    model = run.config.model
    entropy, z, aux = (statistics.mean(0) / max(1, real_tokens)).tolist()
    by_rank = ExpertPlacement(model.n_experts, run.degrees.expert).by_rank(loads).sum(-1)
    fields: dict[str, Any] = {
        "expert_load_max": busiest(loads),
        "rank_load_max": busiest(by_rank),
        "idle_experts": int((loads == 0).sum()),
        "router_entropy": entropy,
    }
    if model.z_loss_weight:
        fields["z_loss"] = z
    if model.aux_loss_weight:
        fields["aux_loss"] = aux
    if run.step % run.config.log.every == 0:
        fields["expert_loads"] = loads.long().tolist()
    return fields
