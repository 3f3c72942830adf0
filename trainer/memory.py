"""The memory that a rank needs at the peak of a training step, as a sum of items: the estimate of `--dry-run`.

A step can have its peak at one of four moments: in the head's forward, in the head's backward, or in the backward of
the last block, when all activations of a micro-batch are held; or at the end of the backward, in the last reduction of
gradients. The estimate is the largest of these. It counts what torch's allocator hands out on
CUDA, with compiled parts unless train.compile=false, and assumes that rows spread evenly over the experts.
docs/parallel.md compares it with the allocator's own numbers.

`element_bytes` is the size of a number in the dtype of the matrix multiplications. If that is 4, nothing is cast, and
there are no copies of weights in another dtype.
"""

from dataclasses import dataclass, fields

import torch

from data.loader import BatchLayout
from model.config import ModelConfig
from model.loss import tokens_per_chunk
from parallel.experts import ExpertPlacement
from parallel.fsdp import ONE_UNIT_BYTES
from parallel.mesh import Degrees
from trainer.config import Config
from trainer.optimizer import bytes_per_weight

CUBLAS_WORKSPACE_BYTES = 32 << 20  # allocated by torch's allocator; 8 MiB on cards before sm90

# an estimate, not measured
OUTSIDE_ALLOCATOR = "about 1 to 1.5 GiB (the CUDA context, loaded kernels, NCCL's buffers)"


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds in one phase of a step, by item."""

    phase: str
    state: int  # fp32 weights and the state of the optimizer
    gradients: int
    weights: int  # in the dtype of the matrix multiplications: gathered by FSDP, or cast
    activations: int  # kept from the forward to the backward
    workspace: int  # temporary tensors of the phase itself
    exchange: int  # rows that are sent to experts of other ranks, or received

    @property
    def total(self) -> int:
        return sum(self.items().values())

    def items(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "phase"}


@dataclass(frozen=True)
class Plan:
    """Sizes that the memory depends on. Properties are numbers of weights, unless they name another unit."""

    config: Config
    vocab_size: int
    element_bytes: int  # of a number in the dtype of the matrix multiplications
    degrees: Degrees
    layout: BatchLayout

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch of one rank."""
        return self.layout.rows * self.config.data.seq_len

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.degrees.replicate * self.degrees.shard

    @property
    def is_compiled(self) -> bool:
        return self.config.train.compile is not False  # `auto` compiles on CUDA

    @property
    def cast_bytes(self) -> int:
        """Bytes of the copy of an fp32 number in the dtype of the matrix multiplications; 0 if they are in fp32."""
        return self.element_bytes if self.element_bytes < 4 else 0

    @property
    def embedding(self) -> int:
        """Weights of the embedding; the head has as many."""
        return self.vocab_size * self.model.dim

    @property
    def experts(self) -> int:
        """Weights of one layer's experts on a rank of the `expert` mesh dimension, before they are sharded further."""
        if not self.model.moe_layers:
            return 0
        slots = ExpertPlacement(self.model.n_experts, self.degrees.expert).slots
        return slots * 3 * self.model.dim * self.model.expert_dim

    @property
    def all_experts(self) -> int:
        """The same for all layers."""
        return len(self.model.moe_layers) * self.experts

    @property
    def dense(self) -> int:
        """All weights other than the routed experts'."""
        model = self.model
        total, _ = model.parameter_counts(self.vocab_size)
        return total - len(model.moe_layers) * model.n_experts * 3 * model.dim * model.expert_dim

    @property
    def block(self) -> int:
        """Weights of a block without its routed experts, the average over all blocks."""
        embedding_and_head = self.embedding if self.model.tie_embeddings else 2 * self.embedding
        return (self.dense - embedding_and_head) // self.model.n_layers

    @property
    def owned(self) -> int:
        """Weights whose fp32 shards this rank keeps."""
        return self.dense // self.degrees.shard + self.all_experts // self.degrees.expert_shard

    @property
    def accumulates(self) -> bool:
        """Whether a step has several micro-batches, whose gradients are added up."""
        return self.layout.micro_batches > 1

    @property
    def accumulates_unsharded(self) -> bool:
        """Whether they are added up before they are sharded, and reduced with the last micro-batch."""
        return self.accumulates and self.config.train.reduce == "once"

    @property
    def is_one_unit(self) -> bool:
        """Whether the whole model is one FSDP unit, gathered at once."""
        return 4 * (self.dense + self.all_experts) <= ONE_UNIT_BYTES

    @property
    def experts_are_units(self) -> bool:
        """Whether the experts of each layer are an FSDP unit, separate from their block."""
        return self.degrees.expert > 1 and self.degrees.replicate * self.degrees.expert_shard > 1

    @property
    def experts_are_unsharded(self) -> bool:
        """Whether FSDP does not shard the experts: each rank owns its experts entirely."""
        return self.world == 1 or (self.degrees.expert > 1 and not self.experts_are_units)

    @property
    def experts_are_in_blocks(self) -> bool:
        """Whether FSDP shards the experts together with their block."""
        return not self.experts_are_unsharded and not self.experts_are_units

    @property
    def cached_cast_bytes(self) -> int:
        """Bytes of cast weights that are kept for all micro-batches of a step: those that FSDP does not gather.

        The embedding is not cast, unless the head shares it.
        """
        cast = self.all_experts if self.experts_are_unsharded else 0
        if self.world == 1:
            cast += self.dense if self.model.tie_embeddings else self.dense - self.embedding
        return self.cast_bytes * cast

    @property
    def unit(self) -> int:
        """Weights that FSDP gathers for a block."""
        return self.block + (self.experts if self.experts_are_in_blocks else 0)

    @property
    def whole_unit(self) -> int:
        """Weights that FSDP gathers if the whole model is one unit."""
        return self.dense + (self.all_experts if self.experts_are_in_blocks else 0)


def memory_needed(config: Config, vocab_size: int, dtype: torch.dtype, degrees: Degrees, layout: BatchLayout) -> Memory:
    """The memory of a rank at the peak of a training step whose matrix multiplications are in `dtype`."""
    plan = Plan(config, vocab_size, dtype.itemsize, degrees, layout)
    phases = (head_forward(plan), head_backward(plan), block_backward(plan), last_reduction(plan))
    return max(phases, key=lambda memory: memory.total)


def head_forward(p: Plan) -> Memory:
    """The last chunk of logits in the head's forward, which also computes the gradients of head and hidden states."""
    logits = tokens_per_chunk(p.tokens, p.vocab_size, torch.device("cuda")) * p.vocab_size
    fp32_bytes = 0 if p.is_compiled or not p.cast_bytes else 4 + 4  # uncompiled: also logits and softmax in fp32
    gradients = 4 * p.embedding + p.tokens * p.model.dim * p.element_bytes
    weights = 0 if p.world == 1 else head_weights(p, 0 if p.model.tie_embeddings else p.embedding)
    return with_activations(
        p, "head, forward", gradients_before(p), weights, logits * (2 * p.element_bytes + fp32_bytes) + gradients
    )


def head_backward(p: Plan) -> Memory:
    """The head's gradient and its cast copy, while FSDP already gathers the last block."""
    workspace = p.embedding * (4 + p.cast_bytes) + 2 * p.tokens * p.model.dim * p.element_bytes
    weights = 0 if p.world == 1 else head_weights(p, p.unit + (p.experts if p.experts_are_units else 0))
    return with_activations(p, "head, backward", gradients_before(p), weights, workspace)


def head_weights(p: Plan, arriving: int) -> int:
    """Bytes of gathered weights in the head: those of the root unit (embedding), the head, and `arriving` weights."""
    if p.is_one_unit:
        return 2 * p.element_bytes * p.whole_unit
    return p.element_bytes * (p.embedding * (1 if p.model.tie_embeddings else 2) + arriving)


def block_backward(p: Plan) -> Memory:
    """The backward of the last block, when the activations of all blocks before it are still held."""
    model = p.model
    gradients = gradients_before(p)
    weights = block_weights(p)
    workspace = 2 * p.tokens * p.element_bytes * model.dim  # the gradients of the block's input and output
    if p.world > 1:
        # the reduced gradient of the head, and the unreduced one, unless it is accumulated in `gradients`
        workspace += 4 * p.embedding // p.degrees.shard + (0 if p.accumulates_unsharded else 4 * p.embedding)
    elif not p.accumulates:
        gradients = 4 * p.embedding
    if not model.is_moe(model.n_layers - 1):
        workspace += 4 * p.tokens * p.element_bytes * model.ffn_dim
        return with_activations(p, "last block, backward", gradients, weights, workspace)
    workspace += expert_backward(p)
    exchange = 2 * p.tokens * model.top_k * p.element_bytes * model.dim if p.degrees.expert > 1 else 0
    return with_activations(p, "last block, backward", gradients, weights, workspace, exchange)


def expert_backward(p: Plan) -> int:
    """Bytes that the backward of a layer's experts needs at most, minus the activations that it has freed by then.

    The backward goes through `down`, whose input (F numbers per row) is then freed, through the SwiGLU activation,
    whose input and gradient have 2 F numbers per row, and through `gate_up`, whose gradient is computed in the dtype of
    the matrix multiplications. F is `model.expert_dim`; a row is the copy of a token that is routed to one expert.
    """
    hidden = p.tokens * p.model.top_k * p.model.expert_dim * p.element_bytes
    # FSDP reduces the gradients of both matrices together, so it holds both
    weight_gradients = p.element_bytes * (2 * p.experts // 3 if p.experts_are_unsharded else p.experts)
    if p.config.train.recompute == "none":
        return max(3 * hidden, weight_gradients - hidden)
    return max(6 * hidden, weight_gradients + 2 * hidden)


def block_weights(p: Plan) -> int:
    """Bytes of gathered weights in the backward of a block, without experts that FSDP does not shard.

    They are those of the root, of this block, of the next one, and of the one that is being gathered.
    """
    if p.world == 1:
        return 0
    weights = p.element_bytes * (2 * p.whole_unit if p.is_one_unit else p.embedding + 3 * p.unit)
    return weights + (3 * p.element_bytes * p.experts if p.experts_are_units else 0)


def last_reduction(p: Plan) -> Memory:
    """The end of the backward: no activations, all gradients, and that of the embedding while it is reduced."""
    workspace = (
        p.embedding * (p.element_bytes + (4 + 4 // p.degrees.shard if p.world > 1 else 0)) + CUBLAS_WORKSPACE_BYTES
    )
    weights = p.element_bytes * p.embedding if p.world > 1 else 0
    return Memory(
        phase="end of the backward",
        state=bytes_per_weight(p.config.train) * p.owned,
        gradients=4 * p.owned,
        weights=weights + p.cached_cast_bytes,
        activations=0,
        workspace=workspace,
        exchange=0,
    )


def with_activations(p: Plan, phase: str, gradients: int, weights: int, workspace: int, exchange: int = 0) -> Memory:
    """The memory of a phase in which all activations are held, with the items that all these phases share."""
    recompute = p.config.train.recompute
    bytes_per_token = sum(
        kept_bytes(p.model, layer, recompute, p.element_bytes, p.is_compiled) for layer in range(p.model.n_layers)
    )
    if phase.startswith("head"):  # the input and output of the last norm
        bytes_per_token += 2 * p.model.dim * p.element_bytes
    return Memory(
        phase=phase,
        state=bytes_per_weight(p.config.train) * p.owned,
        gradients=gradients,
        weights=weights + p.cached_cast_bytes,
        activations=p.tokens * bytes_per_token,
        workspace=workspace + CUBLAS_WORKSPACE_BYTES,
        exchange=exchange,
    )


def gradients_before(p: Plan) -> int:
    """Bytes of gradients that are held when the last micro-batch begins."""
    if not p.accumulates:
        return 0
    if p.accumulates_unsharded or p.world == 1:
        return 4 * (p.dense + p.all_experts)
    return 4 * p.owned


def kept_bytes(model: ModelConfig, layer: int, recompute: str, element_bytes: int, compiled: bool) -> int:
    """Bytes per token that a block keeps from its forward to its backward."""
    kept = element_bytes * kept_numbers(model, layer, recompute, compiled)
    if model.is_moe(layer):
        if recompute != "full" and element_bytes < 4:
            kept += 4 * model.dim  # the router's input, in fp32
        kept += 40 * model.top_k + 4 * model.n_experts  # the permutation of rows, and the router's logits
    if model.dropout and not compiled:
        kept += 2 * model.dim  # dropout masks
    return kept


def kept_numbers(model: ModelConfig, layer: int, recompute: str, compiled: bool) -> int:
    """Numbers per token that a block keeps from its forward to its backward (docs/parallel.md has the table)."""
    dim = model.dim
    kept = 3 * dim  # inputs of the two norms, and of the feed-forward
    if recompute == "none":
        kept += dim + attention_numbers(model, layer, compiled)
    if not model.is_moe(layer):
        return kept + (0 if recompute == "full" else 3 * model.ffn_dim)
    kept += model.top_k * dim
    if recompute == "none":
        kept += 3 * model.top_k * model.expert_dim
    if model.shared_expert:
        kept += model.expert_dim if recompute == "full" else 3 * model.expert_dim
    return kept


def attention_numbers(model: ModelConfig, layer: int, compiled: bool) -> int:
    """Numbers per token that attention keeps, without its norm: projections, rotated or scaled queries, and output."""
    queries = model.head * model.n_heads
    keys = model.head * model.kv_heads
    kept = queries + 2 * keys  # the projected queries, keys and values
    if model.uses_rope(layer):
        kept += queries + keys  # after RoPE, or after the norm if there is one
        if model.qk_norm and not compiled:
            kept += queries + keys  # after RoPE and after the norm: only compiled code recomputes the former
    elif model.temperature_tuning:
        kept += queries  # scaled
    return kept + queries  # the output
