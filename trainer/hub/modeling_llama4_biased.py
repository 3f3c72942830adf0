"""Llama 4 with what its class in transformers cannot express: a balance bias that takes part in the choice of experts,
MoE layers without a shared expert, and the noise matrices of noisy top-k gating, which act in training only.

Exports that need this file contain a copy of it, which transformers loads with trust_remote_code=True.
"""

import torch
from torch import nn
from transformers import Llama4ForCausalLM, Llama4TextConfig


class Llama4BiasedConfig(Llama4TextConfig):
    model_type = "llama4_text_biased"
    shared_expert: bool = True
    noisy_top_k: bool = False


class BiasedRouter(nn.Module):
    """Chooses experts by sigmoid(logit) + bias, in fp32 as in training; the scores are the sigmoids alone."""

    balance_bias: torch.Tensor

    def __init__(self, config: Llama4BiasedConfig) -> None:
        super().__init__()
        n_experts, dim = config.num_local_experts, config.hidden_size
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        self.noise = nn.Parameter(torch.empty(n_experts, dim)) if config.noisy_top_k else None
        self.register_buffer("balance_bias", torch.zeros(n_experts))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states (T, D) -> scores (T, E), which are zero for experts that were not chosen, and logits (T, E)."""
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        logits = nn.functional.linear(hidden_states.to(wide), self.weight.to(wide))
        # sigmoid(x) - 1 instead of sigmoid(x), which rounds to 1 for every large logit
        chosen = torch.topk(self.balance_bias - torch.sigmoid(-logits), self.top_k, dim=-1).indices
        scores = torch.zeros_like(logits).scatter(1, chosen, logits.gather(1, chosen).sigmoid())
        return scores.to(hidden_states.dtype), logits.to(hidden_states.dtype)


class NoExpert(nn.Module):
    """Replaces the shared expert of Llama 4 in models without one: its output is zero."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class Llama4BiasedForCausalLM(Llama4ForCausalLM):
    config_class = Llama4BiasedConfig
    _keep_in_fp32_modules_strict = ["balance_bias"]

    def __init__(self, config: Llama4BiasedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            if layer.is_moe_layer:
                layer.feed_forward.router = BiasedRouter(config)
                if not config.shared_expert:
                    layer.feed_forward.shared_expert = NoExpert()
