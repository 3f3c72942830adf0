"""The floor: the time of the matrix products, the attention and the optimizer that a training step cannot avoid.

It consists of every matrix product of the forward and both products of the backward at its own shape, with operands
that exist already, tokens spread evenly over the experts, and each product computed by the faster of one batched call
and one call for each expert; fused attention in forward and backward; all of it in one dtype; and fused AdamW in fp32
over the same number of parameters.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from model.config import ModelConfig

Job = Callable[[], object]


def products(m: int, k: int, n: int, count: int = 1, dtype: torch.dtype = torch.float32) -> list[Job]:
    """`count` products of x (m, k) and w (k, n), and the gradients of both."""
    x, grad, weight = (torch.randn(count, *shape).to(dtype) for shape in ((m, k), (m, n), (n, k)))
    return [
        fastest(a, b, torch.empty(count, a.shape[1], b.shape[2], dtype=dtype))
        for a, b in ((x, weight.transpose(1, 2)), (grad, weight), (grad.transpose(1, 2), x))
    ]


def fastest(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Job:
    """The faster of two ways to compute a batch of products, by the best time of three calls each."""

    def batched() -> None:
        torch.bmm(a, b, out=out)

    def one_by_one() -> None:
        for i in range(len(a)):
            torch.mm(a[i], b[i], out=out[i])

    def best_seconds(job: Job) -> float:
        job()  # warm-up
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            job()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return min((batched, one_by_one), key=best_seconds)


def block_products(config: ModelConfig, layer: int, tokens: int, dtype: torch.dtype) -> list[Job]:
    """The products of one block, without those of attention itself (queries with keys, weights with values)."""
    d, heads = config.dim, config.head * (config.n_heads + 2 * config.kv_heads)
    jobs = products(tokens, d, heads, dtype=dtype) + products(tokens, config.head * config.n_heads, d, dtype=dtype)
    if not config.is_moe(layer):
        return jobs + feed_forward(tokens, d, config.ffn_dim, dtype=dtype)
    return jobs + moe_products(config, tokens, dtype)


def feed_forward(tokens: int, d: int, f: int, count: int = 1, dtype: torch.dtype = torch.float32) -> list[Job]:
    """The products of `count` SwiGLUs of `tokens` tokens each."""
    return products(tokens, d, 2 * f, count, dtype) + products(tokens, f, d, count, dtype)


def moe_products(config: ModelConfig, tokens: int, dtype: torch.dtype = torch.float32) -> list[Job]:
    """The products of the router, the shared expert, and the routed experts, each with an equal share of the tokens."""
    d, f, e = config.dim, config.expert_dim, config.n_experts
    shared = feed_forward(tokens, d, f, dtype=dtype) if config.shared_expert else []
    return products(tokens, d, e, dtype=dtype) + shared + feed_forward(tokens * config.top_k // e, d, f, e, dtype)


def step(
    config: ModelConfig, vocab_size: int, batch: int, length: int, dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """The floor of a whole training step of `batch` rows of `length` tokens."""
    tokens = batch * length
    jobs: list[Job] = []
    q = torch.randn(batch, config.n_heads, length, config.head).to(dtype).requires_grad_()
    for layer in range(config.n_layers):
        jobs += block_products(config, layer, tokens, dtype)
        jobs.append(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward())
    jobs += products(tokens, config.dim, vocab_size, dtype=dtype)
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
