"""The experts: an MoE block, compared with its own products and with a loop over the experts.

Also a training step with experts on two ranks, compared with experts that FSDP alone shards.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import ForwardContext
from model.moe import MoE
from parallel import mesh
from parallel.build import build_model
from tests.bench import floor
from tests.bench.harness import Figure, alternate, figure
from tests.support.pool import Pool
from trainer.machine import keep_freed_memory

TOKENS = 2048
CONFIG = ModelConfig(dim=768, expert_dim=2048, n_experts=31, n_layers=1)


def moe_block() -> MoE:
    """An MoE block with initial weights."""
    moe = MoE(CONFIG, 0)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return moe


def step(moe: nn.Module, x: Tensor) -> Callable[[], None]:
    """A function for forward and backward of a block on x (B, S, D)."""
    context = ForwardContext.create(CONFIG, x)

    def call() -> None:
        out, _, _ = moe(x, context)
        out.backward(x.detach())
        for tensor in (x, *moe.parameters()):
            tensor.grad = None

    return call


class Loop(nn.Module):
    """An MoE block with the usual loop over the experts, which indexes weights and tokens."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, None, None]:
        moe, tokens = self.moe, x.flatten(0, 1)
        scores, experts, _, _ = moe.router(tokens, context.is_real.flatten(), None)
        out = torch.zeros_like(tokens)
        for e in range(CONFIG.n_experts):
            rows = (experts[:, 0] == e).nonzero()[:, 0]
            gate, up = (tokens[rows] * scores[rows] @ moe.experts.gate_up[e]).chunk(2, -1)
            out = out.index_add(0, rows, F.silu(gate) * up @ moe.experts.down[e])
        assert moe.shared is not None
        return (out + moe.shared(tokens)).view_as(x), None, None


@functools.cache
def _plain_loop() -> Callable[[], None]:
    return step(Loop(moe_block()), torch.randn(4, TOKENS // 4, CONFIG.dim, requires_grad=True))


def plain_loop(threads: int) -> None:
    """Run a step of the loop. It runs in a process of its own, with the default settings of the allocator."""
    torch.set_num_threads(threads)
    _plain_loop()()


def measure(repeats: int) -> list[Figure]:
    """All figures of the experts."""
    keep_freed_memory()
    moe, x = moe_block(), torch.randn(4, TOKENS // 4, CONFIG.dim, requires_grad=True)
    context, tokens = ForwardContext.create(CONFIG, x), x.detach().flatten(0, 1)

    def routing() -> None:
        """Routing, sorting and regrouping, and their backward, without the experts."""
        y = tokens.view_as(x).requires_grad_()
        routed = moe.route(y, context)
        moe.unpermute(routed.rows, None, routed.order, routed.inverse, routed.n_real).backward(tokens)
        moe.router.weight.grad = None

    pool, threads = Pool(), torch.get_num_threads()
    products = floor.moe_products(CONFIG, TOKENS)
    cases = {
        "block": step(moe, x),
        "products": lambda: [job() for job in products],
        "loop": step(Loop(moe), x),
        "plain loop": lambda: pool.run(1, "tests.bench.experts:plain_loop", threads=threads),
        "routing": routing,
    }
    times = alternate(cases, repeats)
    pool.close()
    size = f"{TOKENS:,} tokens, dim {CONFIG.dim}, {CONFIG.n_experts} + 1 experts of {CONFIG.expert_dim:,}, fp32"
    name = f"MoE block ({size})"
    over_loop = "speed over a loop that indexes weights"
    return [
        figure(name, times["block"], times["products"], "share of its products' speed", "0.85", True),
        figure(name, times["block"], times["plain loop"], over_loop, "4", True),
        figure(name, times["block"], times["loop"], f"{over_loop}, with this trainer's allocator settings", "", True),
        figure("routing, sorting, regrouping", times["routing"], times["block"], "share of the block's time", "0.08"),
        *on_two_ranks(repeats),
    ]


def on_two_ranks(repeats: int) -> list[Figure]:
    """A training step on two ranks with one thread each: experts on both ranks, and experts that FSDP alone shards."""
    pool = Pool()
    figures = []
    for name, keys in SHAPES.items():
        fsdp, experts = pool.run(2, "tests.bench.experts:two_ranks", timeout=600, keys=keys, repeats=repeats)[0]
        figures.append(figure(f"step on 2 ranks, {name}", experts, fsdp, "time of expert=2 over expert=1", "1.10"))
    pool.close()
    return figures


SHAPES = {
    "launch/tiny.yaml's model, 2,048 tokens a rank": dict(
        dim=64, n_layers=3, n_heads=2, expert_dim=64, n_experts=31, max_seq_len=128, vocab=1024, rows=16
    ),
    "dim 256, 4 layers, experts of 512, 2,048 tokens a rank": dict(
        dim=256, n_layers=4, n_heads=8, expert_dim=512, n_experts=31, max_seq_len=128, vocab=4096, rows=16
    ),
}


def two_ranks(keys: dict[str, int], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of alternating steps with parallel.expert=1 and with parallel.expert=2, on this rank."""
    from trainer.config import TrainConfig
    from trainer.optimizer import make_optimizer

    keep_freed_memory()
    keys = dict(keys)
    vocab, rows = keys.pop("vocab"), keys.pop("rows")
    config, world, cpu = ModelConfig(**keys), mesh.World.from_environment(), torch.device("cpu")
    tokens = torch.randint(0, vocab, (rows, config.max_seq_len), generator=torch.Generator().manual_seed(world.rank))

    def train_step(expert: int) -> Callable[[], None]:
        layout = mesh.make_mesh(mesh.Degrees(1, 2, expert), cpu)
        model = build_model(config, vocab, 0, cpu, torch.float32, layout)
        optimizer = make_optimizer(model, TrainConfig(steps=1))

        def call() -> None:
            output = model(tokens, tokens)
            assert output.loss is not None
            (output.loss / tokens.numel()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return call

    times = alternate({"expert=1": train_step(1), "expert=2": train_step(2)}, repeats)
    return times["expert=1"], times["expert=2"]
