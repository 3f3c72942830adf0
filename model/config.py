"""The shape of the model: the `model` section of a config.

This module does not import torch, so that a wrong setting is reported immediately.
"""

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Keys of ModelConfig that have no counterpart in Llama 4. The export refuses a model that changes their defaults.
BEYOND_LLAMA4: frozenset[str] = frozenset()


class RopeScaling(BaseModel):
    """How Llama 3 stretches RoPE wavelengths, for sequences longer than those of the first training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    factor: float = Field(8.0, gt=0, description="factor by which the context becomes longer")
    low_freq_factor: float = Field(1.0, gt=0, description="original length / this: longer wavelengths are stretched")
    high_freq_factor: float = Field(4.0, gt=0, description="original length / this: shorter wavelengths stay unchanged")
    original_max_position_embeddings: int = Field(8192, ge=1, description="original length, of the first training")

    @model_validator(mode="after")
    def _check(self) -> "RopeScaling":
        if self.high_freq_factor < self.low_freq_factor:
            raise ValueError("high_freq_factor must not be below low_freq_factor")
        return self


class ModelConfig(BaseModel):
    """A Llama 4 text model (its vocabulary is the tokenizer's)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(768, ge=1, description="width of the residual stream (D)")
    n_layers: int = Field(8, ge=1, description="transformer blocks")
    n_heads: int = Field(8, ge=1, description="query heads (H)")
    n_kv_heads: int | None = Field(None, ge=1, description="key and value heads; null: n_heads")
    head_dim: int | None = Field(None, ge=2, description="width of a head; null: dim / n_heads")
    ffn_dim: int = Field(2048, ge=1, description="hidden width of the dense blocks (F)")
    expert_dim: int = Field(2048, ge=1, description="hidden width of each expert, and of the shared one (F)")
    n_experts: int = Field(31, ge=1, description="routed experts (E)")
    top_k: int = Field(1, ge=1, description="experts a token is sent to (K)")
    shared_expert: bool = Field(True, description="one more expert that processes every token")
    moe_every: int = Field(1, ge=0, description="every n-th block is a mixture of experts, the rest dense; 0: none")
    max_seq_len: int = Field(1024, ge=1, description="longest sequence of the model, in tokens")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the RoPE wavelengths")
    rope_scaling: RopeScaling | None = Field(None, description="RoPE scaling of Llama 3: factor, low_freq_factor, ...")
    nope_every: int = Field(
        4, ge=0, description="every n-th layer has no RoPE and attends to all earlier tokens; 0: none"
    )
    attention_chunk: int | None = Field(
        None, ge=1, description="RoPE layers attend within chunks of this many tokens; null: no chunks"
    )
    qk_norm: bool = Field(True, description="L2 norm of queries and keys after RoPE, on RoPE layers")
    temperature_tuning: bool = Field(True, description="scale queries by position on NoPE layers")
    temperature_floor: int = Field(8192, ge=1, description="positions after which that scale grows by one step")
    temperature_scale: float = Field(0.1, ge=0, description="how much that scale grows")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the norms")
    tie_embeddings: bool = Field(False, description="the head shares the embedding's weights")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="of embedding, attention output and block output, rounded to 1/256"
    )
    attention_dropout: float = Field(
        0.0, ge=0, lt=1, description="of attention weights; reproducible only on the same mesh"
    )
    noisy_top_k: bool = Field(False, description="learned noise on the router's logits in training (one more matrix)")
    balance_rate: float = Field(
        0.001, ge=0, description="by how much each step moves the balance bias of the routers; 0: no balancing"
    )
    balance_until: float | None = Field(
        None, ge=0, lt=1, description="fraction of the steps after which the bias fades to zero; null: never"
    )
    aux_loss_weight: float = Field(
        0.0, ge=0, description="weight of the auxiliary balance loss over the global batch; needs one more forward"
    )
    z_loss_weight: float = Field(0.0, ge=0, description="weight of the routers' z-loss, which keeps their logits small")

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads}: does not divide dim={self.dim}; set head_dim, or change n_heads")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads={self.kv_heads}: does not divide n_heads={self.n_heads}")
        if self.head % 2:
            raise ValueError(f"head_dim={self.head}: RoPE rotates pairs of numbers, so it must be even")
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k={self.top_k}: more than n_experts={self.n_experts}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    @property
    def has_router_loss(self) -> bool:
        """Whether the loss depends on the routers' logits."""
        return self.aux_loss_weight > 0 or self.z_loss_weight > 0

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` (from 0) holds experts."""
        return self.moe_every > 0 and (layer + 1) % self.moe_every == 0

    def uses_rope(self, layer: int) -> bool:
        """Whether block `layer` (from 0) has RoPE; a NoPE layer has no positions, and sees all tokens before."""
        return self.nope_every == 0 or (layer + 1) % self.nope_every != 0

    @property
    def moe_layers(self) -> list[int]:
        return [i for i in range(self.n_layers) if self.is_moe(i)]

    def parameter_counts(self, vocab_size: int) -> tuple[int, int]:
        """Returns the number of all parameters, and of those that compute with one token."""
        attention = self.dim * self.head * (2 * self.n_heads + 2 * self.kv_heads) + 2 * self.dim
        dense, expert = 3 * self.dim * self.ffn_dim, 3 * self.dim * self.expert_dim
        moe = len(self.moe_layers)
        common = (
            vocab_size * self.dim * (1 if self.tie_embeddings else 2)
            + self.dim
            + self.n_layers * attention
            + (self.n_layers - moe) * dense
            + moe * (self.n_experts * self.dim * (2 if self.noisy_top_k else 1) + (expert if self.shared_expert else 0))
        )
        return common + moe * self.n_experts * expert, common + moe * self.top_k * expert

    def flops_per_token(self, vocab_size: int, length: int) -> float:
        """Floating-point operations to train on one token of a sequence of `length` tokens, forward and backward.

        A multiplication and an addition count as two, and the backward counts twice the forward. So each
        multiplication of a token by a matrix of n weights counts 6 n. The forward, in the letters of the settings
        above, with KV key and value heads and a vocabulary of V tokens:

            attention projections   2 D head_dim (2 H + 2 KV) a layer
            attention scores        4 H head_dim keys a layer: queries with keys, then weights with values
            router                  2 D E an MoE layer, twice that with noisy_top_k
            experts                 6 D F (K + shared) an MoE layer
            dense feed-forward      6 D F a dense layer
            head                    2 D V

        keys is the average number of keys that a query sees (`average_keys`). Not counted are the embedding, which is
        a lookup; norms, activations and the loss, which are no matrix multiplications; and everything that is computed
        a second time (train.recompute, the extra forward of aux_loss_weight, the backward of fused attention). The keys
        that data.mask_documents hides are counted.
        """
        moe = len(self.moe_layers)
        projections = 2 * self.dim * self.head * (2 * self.n_heads + 2 * self.kv_heads)
        scores = sum(4 * self.n_heads * self.head * self.average_keys(i, length) for i in range(self.n_layers))
        router = 2 * self.dim * self.n_experts * (2 if self.noisy_top_k else 1)
        experts = 6 * self.dim * self.expert_dim * (self.top_k + int(self.shared_expert))
        dense = 6 * self.dim * self.ffn_dim
        head = 2 * self.dim * vocab_size
        forward = self.n_layers * projections + scores + moe * (router + experts) + (self.n_layers - moe) * dense + head
        return 3 * forward

    def average_keys(self, layer: int, length: int) -> float:
        """The mean, over a sequence of `length` tokens, of the keys that a query of block `layer` (from 0) sees.

        A query sees its own key, too.
        """
        chunk = length
        if self.uses_rope(layer) and self.attention_chunk is not None:
            chunk = min(self.attention_chunk, length)
        chunks, remainder = divmod(length, chunk)
        return (chunks * chunk * (chunk + 1) + remainder * (remainder + 1)) / 2 / length
