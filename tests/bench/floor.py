"""What a perfect trainer would take: a step's own products from operands that are there, attention, and AdamW.

The definition is that of the usual yardstick for such trainers: every matrix product of the forward and both of the
backward at its own shape, tokens spread evenly over the experts, each product by the faster of one batched call and
one call for each expert; fused attention forward and backward; fused AdamW over as many parameters.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from model.config import ModelConfig

Job = Callable[[], object]


def products(m: int, k: int, n: int, count: int = 1) -> list[Job]:
    """x (m, k) times w (k, n), and the gradients of both, `count` times over."""
    x, grad, weight = torch.randn(count, m, k), torch.randn(count, m, n), torch.randn(count, n, k)
    return [
        fastest(a, b, torch.empty(count, a.shape[1], b.shape[2]))
        for a, b in ((x, weight.transpose(1, 2)), (grad, weight), (grad.transpose(1, 2), x))
    ]


def fastest(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Job:
    """The quicker way to a batch of products, by the best of three goes each."""

    def at_once() -> None:
        torch.bmm(a, b, out=out)

    def one_by_one() -> None:
        for i in range(len(a)):
            torch.mm(a[i], b[i], out=out[i])

    def cost(way: Job) -> float:
        way()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
        return min(times)

    return min((at_once, one_by_one), key=cost)


def block_products(config: ModelConfig, layer: int, tokens: int) -> list[Job]:
    """Those of one block, without attention itself."""
    d, heads = config.dim, config.head * (config.n_heads + 2 * config.kv_heads)
    jobs = products(tokens, d, heads) + products(tokens, config.head * config.n_heads, d)
    if not config.is_moe(layer):
        return jobs + products(tokens, d, 2 * config.ffn_dim) + products(tokens, config.ffn_dim, d)
    return jobs + moe_products(config, tokens)


def moe_products(config: ModelConfig, tokens: int) -> list[Job]:
    """Router, shared expert, and the routed ones, each with its even share of the tokens."""
    d, f, e = config.dim, config.expert_dim, config.n_experts
    jobs = products(tokens, d, e)
    if config.shared_expert:
        jobs += products(tokens, d, 2 * f) + products(tokens, f, d)
    share = tokens * config.top_k // e
    return jobs + products(share, d, 2 * f, e) + products(share, f, d, e)


def step(config: ModelConfig, vocab_size: int, batch: int, length: int) -> Callable[[], None]:
    """A whole training step of `batch` rows of `length` tokens."""
    tokens, jobs = batch * length, list[Job]()
    q = torch.randn(batch, config.n_heads, length, config.head, requires_grad=True)
    for layer in range(config.n_layers):
        jobs += block_products(config, layer, tokens)
        jobs.append(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward())
    jobs += products(tokens, config.dim, vocab_size)
    count, _ = config.parameter_counts(vocab_size)
    parameters = [torch.randn(n, requires_grad=True) for n in [1 << 20] * (count >> 20) + [count % (1 << 20)]]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def run() -> None:
        for job in jobs:
            job()
        optimizer.step()

    return run
