"""How much memory a rank needs at its peak, as a sum of parts that can be looked at one by one.

A step has two moments at which the most is held, with all activations of a micro-batch: in the head, and in the
backward of the last block. Whichever takes more is the peak. Counted is what torch's allocator hands out on CUDA, with
compiled parts unless train.compile=false; rows are taken to spread evenly over the experts.

Letters: T tokens of a micro-batch, D dim, F hidden, K top-k, V vocabulary; c bytes of a number in the dtype of the
products. Where c is 4, nothing is cast, and what is said of casts falls away.
"""

from dataclasses import dataclass, fields

import torch

from data.loader import BatchLayout
from model.config import ModelConfig
from model.loss import chunk_rows
from parallel.experts import ExpertPlacement
from parallel.fsdp import ONE_UNIT_BYTES
from parallel.mesh import Degrees
from trainer.config import Config

CUBLAS_WORKSPACE = 32 << 20  # torch's allocator gives it; on cards before sm90 it is 8 MiB

OUTSIDE = "about 1 to 1.5 GiB (the CUDA context, loaded kernels, NCCL's buffers)"  # an estimate that nobody measured


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at its peak."""

    moment: str  # at which the peak is
    state: int  # fp32 weights and AdamW's two moments
    gradients: int
    weights: int  # in the dtype of the products: gathered by FSDP, or cast
    activations: int  # kept from the forward to the backward
    working: int  # what the moment itself takes
    messages: int  # rows on their way to experts

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moment"}


@dataclass(frozen=True)
class Plan:
    """What the memory depends on, in numbers of weights and of tokens."""

    config: Config
    vocab_size: int
    c: int  # bytes of a number in the dtype of the products
    degrees: Degrees
    share: BatchLayout

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def tokens(self) -> int:
        return self.share.rows * self.config.data.seq_len

    @property
    def world(self) -> int:
        return self.degrees.replicate * self.degrees.shard

    @property
    def compiled(self) -> bool:
        return self.config.train.compile is not False  # auto: on CUDA

    @property
    def cast(self) -> int:
        """Bytes of the copy of an fp32 number that is made to compute with it."""
        return self.c if self.c < 4 else 0

    @property
    def table(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.vocab_size * self.model.dim

    @property
    def experts(self) -> int:
        """Weights of the experts of a layer that the ranks of an expert mesh hold, before they are sharded further."""
        if not self.model.moe_layers:
            return 0
        return (
            ExpertPlacement(self.model.n_experts, self.degrees.expert).slots
            * 3
            * self.model.dim
            * self.model.expert_dim
        )

    @property
    def all_experts(self) -> int:
        return len(self.model.moe_layers) * self.experts

    @property
    def dense(self) -> int:
        """All other weights."""
        total, _ = self.model.parameter_counts(self.vocab_size)
        model = self.model
        return total - len(model.moe_layers) * model.n_experts * 3 * model.dim * model.expert_dim

    @property
    def block(self) -> int:
        """Weights of a block without its experts, the average of all."""
        tables = self.table if self.model.tie_embeddings else 2 * self.table
        return (self.dense - tables) // self.model.n_layers

    @property
    def held(self) -> int:
        """Weights that lie here for good."""
        return self.dense // self.degrees.shard + self.all_experts // self.degrees.expert_shard

    @property
    def several(self) -> bool:
        return self.share.micro_batches > 1

    @property
    def sums_unsharded(self) -> bool:
        """Whether micro-batches add up whole gradients, which are reduced at the last one."""
        return self.several and self.config.train.reduce == "once"

    @property
    def one_unit(self) -> bool:
        """Whether FSDP gathers the whole model at once."""
        return 4 * (self.dense + self.all_experts) <= ONE_UNIT_BYTES

    @property
    def experts_sharded(self) -> bool:
        """Whether the experts are units of FSDP of their own."""
        return self.degrees.expert > 1 and self.degrees.replicate * self.degrees.expert_shard > 1

    @property
    def experts_whole(self) -> bool:
        """Whether the experts lie here whole, out of FSDP's hands."""
        return self.world == 1 or (self.degrees.expert > 1 and not self.experts_sharded)

    @property
    def experts_inside(self) -> bool:
        """Whether FSDP shards the experts with the rest of their block."""
        return not self.experts_whole and not self.experts_sharded

    @property
    def copies(self) -> int:
        """Bytes of the cast weights that are kept for all micro-batches of a step: of those that FSDP does not gather.

        The embedding is not cast.
        """
        dense = self.dense - (0 if self.model.tie_embeddings else self.table) if self.world == 1 else 0
        return self.cast * (dense + (self.all_experts if self.experts_whole else 0))

    @property
    def unit(self) -> int:
        """Weights that FSDP gathers for a block."""
        return self.block + (self.experts if self.experts_inside else 0)

    @property
    def whole_unit(self) -> int:
        """Weights that FSDP gathers where the whole model is one unit."""
        return self.dense + (self.all_experts if self.experts_inside else 0)


def memory_needed(config: Config, vocab_size: int, dtype: torch.dtype, degrees: Degrees, share: BatchLayout) -> Memory:
    """What a rank needs at its peak in training."""
    plan = Plan(config, vocab_size, dtype.itemsize, degrees, share)
    moments = (head_forward(plan), head_backward(plan), block_backward(plan), last_reduction(plan))
    return max(moments, key=lambda memory: memory.total)


def head_forward(p: Plan) -> Memory:
    """The head's last chunk of logits, and the gradients that it has made so far."""
    logits = chunk_rows(p.tokens, p.vocab_size, torch.device("cuda")) * p.vocab_size
    wide = 0 if p.compiled or not p.cast else 4 + 4  # uncompiled: besides, the logits and their softmax in fp32
    gradients = 4 * p.table + p.tokens * p.model.dim * p.c
    weights = 0 if p.world == 1 else head_weights(p, 0 if p.model.tie_embeddings else p.table)
    return moment(p, "head, forward", gradients_before(p), weights, logits * (2 * p.c + wide) + gradients)


def head_backward(p: Plan) -> Memory:
    """The gradient of the head is cast; FSDP gathers the last block ahead."""
    working = p.table * (4 + p.cast) + 2 * p.tokens * p.model.dim * p.c
    weights = 0 if p.world == 1 else head_weights(p, p.unit + (p.experts if p.experts_sharded else 0))
    return moment(p, "head, backward", gradients_before(p), weights, working)


def head_weights(p: Plan, arriving: int) -> int:
    """Gathered weights besides the experts': the root, which is the embedding, the head, and what is arriving."""
    if p.one_unit:
        return 2 * p.c * p.whole_unit
    return p.c * (p.table * (1 if p.model.tie_embeddings else 2) + arriving)


def block_backward(p: Plan) -> Memory:
    """The backward of the last block, when no activation of a block before it is freed yet."""
    model, last = p.model, p.model.n_layers - 1
    gradients, weights, reduced = gradients_before(p), block_weights(p), 0
    if p.world > 1:
        # of the head: its sum over the ranks, and unless it was there before, what is added up
        reduced = 4 * p.table // p.degrees.shard + (0 if p.sums_unsharded else 4 * p.table)
    elif not p.several:
        gradients = 4 * p.table
    working = 2 * p.tokens * p.c * model.dim + reduced  # the gradients of what came in and of what went out
    if not model.is_moe(last):
        return moment(p, "last block, backward", gradients, weights, working + 4 * p.tokens * p.c * model.ffn_dim)
    working += expert_backward(p)
    messages = 2 * p.tokens * model.top_k * p.c * model.dim if p.degrees.expert > 1 else 0
    return moment(p, "last block, backward", gradients, weights, working, messages)


def expert_backward(p: Plan) -> int:
    """What the backward of a layer's experts takes at most, less what it has freed of the activations.

    It comes from `down`, whose input of F numbers a row is free by now, to SwiGLU, whose input and gradient have 2 F,
    and to `gate_up`, whose gradient is made in the dtype of the products.
    """
    hidden = p.tokens * p.model.top_k * p.model.expert_dim * p.c
    # FSDP takes the gradients of both matrices together
    to_weights = p.c * (2 * p.experts // 3 if p.experts_whole else p.experts)
    if p.config.train.recompute == "none":
        return max(3 * hidden, to_weights - hidden)
    return max(6 * hidden, to_weights + 2 * hidden)


def block_weights(p: Plan) -> int:
    """Weights besides whole experts that are there in the backward of a block: the root, this block, the next one, and
    what arrived of it."""
    if p.world == 1:
        return 0
    weights = p.c * (2 * p.whole_unit if p.one_unit else p.table + 3 * p.unit)
    return weights + (3 * p.c * p.experts if p.experts_sharded else 0)


def last_reduction(p: Plan) -> Memory:
    """The end of the backward: no activations, all gradients, and the embedding's on its way."""
    working = p.table * (p.c + (4 + 4 // p.degrees.shard if p.world > 1 else 0)) + CUBLAS_WORKSPACE
    weights = p.c * p.table if p.world > 1 else 0
    return Memory("end of the backward", 12 * p.held, 4 * p.held, weights + p.copies, 0, working, 0)


def moment(p: Plan, name: str, gradients: int, weights: int, working: int, messages: int = 0) -> Memory:
    """With what is the same at all moments: state, activations, and copies of weights that a step keeps."""
    recompute, layers = p.config.train.recompute, range(p.model.n_layers)
    kept = sum(kept_bytes(p.model, layer, recompute, p.c, p.compiled) for layer in layers)
    if name.startswith("head"):  # the norm's input and output
        kept += 2 * p.model.dim * p.c
    working += CUBLAS_WORKSPACE
    return Memory(name, 12 * p.held, gradients, weights + p.copies, p.tokens * kept, working, messages)


def gradients_before(p: Plan) -> int:
    """Bytes of gradients that are there when the last micro-batch begins."""
    if not p.several:
        return 0
    whole = p.sums_unsharded or p.world == 1
    return 4 * (p.dense + p.all_experts if whole else p.held)


def kept_bytes(model: ModelConfig, layer: int, recompute: str, c: int, compiled: bool) -> int:
    """Bytes a token that a block keeps from its forward to its backward."""
    kept = c * kept_numbers(model, layer, recompute, compiled)
    if model.is_moe(layer):
        if recompute != "full" and c < 4:
            kept += 4 * model.dim  # the router's input
        kept += 40 * model.top_k + 4 * model.n_experts  # the order of rows, and the router's logits
    if model.dropout and not compiled:
        kept += 2 * model.dim  # masks
    return kept


def kept_numbers(model: ModelConfig, layer: int, recompute: str, compiled: bool) -> int:
    """Numbers a token that a block keeps from its forward to its backward (docs/parallel.md has the table)."""
    d, none, full = model.dim, recompute == "none", recompute == "full"
    attention = 2 * d + attention_numbers(model, layer, compiled) if none else d
    if not model.is_moe(layer):
        return attention + 2 * d + (0 if full else 3 * model.ffn_dim)
    routed = model.top_k * d + (3 * model.top_k * model.expert_dim if none else 0)
    shared = model.expert_dim * (1 if full else 3) if model.shared_expert else 0
    return attention + 2 * d + routed + shared


def attention_numbers(model: ModelConfig, layer: int, compiled: bool) -> int:
    """The same of attention without its norm: queries, keys and values as projected, what became of them, and out."""
    queries, keys = model.head * model.n_heads, model.head * model.kv_heads
    projected, out = queries + 2 * keys, queries
    if model.uses_rope(layer):  # turned, and then normalized; compiled, the former is made again
        return projected + (queries + keys) * (2 if model.qk_norm and not compiled else 1) + out
    return projected + (queries if model.temperature_tuning else 0) + out
