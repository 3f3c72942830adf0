"""The experts: a block against its own products and against the usual loop; experts on other ranks against at home."""

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
from tests.bench.harness import Figure, figure, in_turns
from tests.support.pool import Pool
from trainer.machine import keep_freed_memory

TOKENS = 2048
CONFIG = ModelConfig(dim=768, expert_dim=2048, n_experts=31, n_layers=1)


def block() -> MoE:
    """A block with initial weights."""
    moe = MoE(CONFIG, 0)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return moe


def step(moe: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward of a block."""
    context = ForwardContext.create(CONFIG, x)

    def call() -> None:
        out, _, _ = moe(x, context)
        out.backward(x.detach())
        for tensor in (x, *moe.parameters()):
            tensor.grad = None

    return call


class Loop(nn.Module):
    """The usual loop over experts, which indexes weights and tokens."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, None, None]:
        moe, tokens = self.moe, x.flatten(0, 1)
        scores, experts, _, _ = moe.router(tokens, context.is_real.flatten(), None)
        out = torch.zeros_like(tokens)
        for e in range(CONFIG.n_experts):
            where = (experts[:, 0] == e).nonzero()[:, 0]
            gate, up = (tokens[where] * scores[where] @ moe.experts.gate_up[e]).chunk(2, -1)
            out = out.index_add(0, where, F.silu(gate) * up @ moe.experts.down[e])
        assert moe.shared is not None
        return (out + moe.shared(tokens)).view_as(x), None, None


@functools.cache
def _plain_loop() -> Callable[[], None]:
    return step(Loop(block()), torch.randn(4, TOKENS // 4, CONFIG.dim, requires_grad=True))


def plain_loop(threads: int) -> None:
    """A step of the loop in a process of its own, where memory is handled as in any Python program."""
    torch.set_num_threads(threads)
    _plain_loop()()


def measure(repeats: int) -> list[Figure]:
    """All figures of the experts."""
    keep_freed_memory()
    moe, x = block(), torch.randn(4, TOKENS // 4, CONFIG.dim, requires_grad=True)
    context, tokens = ForwardContext.create(CONFIG, x), x.detach().flatten(0, 1)

    def way() -> None:
        """Routing, sorting and regrouping, and their backward, without the experts."""
        y = tokens.view_as(x).requires_grad_()
        routed = moe.route(y, context)
        moe.unpermute(routed.rows, None, routed.order, routed.inverse, routed.n_real).backward(tokens)
        moe.router.weight.grad = None

    pool, threads = Pool(), torch.get_num_threads()
    alone = floor.moe_products(CONFIG, TOKENS)
    cases = {
        "block": step(moe, x),
        "products": lambda: [job() for job in alone],
        "loop": step(Loop(moe), x),
        "plain loop": lambda: pool.run(1, "tests.bench.experts:plain_loop", threads=threads),
        "way": way,
    }
    times = in_turns(cases, repeats)
    pool.close()
    size = f"{TOKENS:,} tokens, dim {CONFIG.dim}, {CONFIG.n_experts} + 1 experts of {CONFIG.expert_dim:,}, fp32"
    return [
        figure(f"MoE block ({size})", times["block"], times["products"], "share of its products' speed", "0.85", True),
        figure("the same", times["block"], times["plain loop"], "speed over a loop that indexes weights", "4", True),
        figure("the same", times["block"], times["loop"], "that loop with this trainer's allocator settings", "", True),
        figure("routing, sorting, regrouping", times["way"], times["block"], "share of the block's time", "0.08"),
        *ranks(repeats),
    ]


def ranks(repeats: int) -> list[Figure]:
    """A training step on two ranks, one thread each: experts on both against sharded by FSDP alone."""
    pool = Pool()
    figures = []
    for name, keys in SHAPES.items():
        home, away = pool.run(2, "tests.bench.experts:two_ranks", timeout=600, keys=keys, repeats=repeats)[0]
        figures.append(figure(f"step on 2 ranks, {name}", away, home, "time of expert=2 over expert=1", "1.10"))
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
    """Seconds of steps with expert=1 and with expert=2, in turns, on this rank."""
    from trainer.config import TrainConfig
    from trainer.optimizer import make_optimizer

    keep_freed_memory()
    keys = dict(keys)
    vocab, rows = keys.pop("vocab"), keys.pop("rows")
    config, world, cpu = ModelConfig(**keys), mesh.World.from_environment(), torch.device("cpu")
    tokens = torch.randint(0, vocab, (rows, config.max_seq_len), generator=torch.Generator().manual_seed(world.rank))

    def one(expert: int) -> Callable[[], None]:
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

    times = in_turns({"home": one(1), "away": one(2)}, repeats)
    return times["home"], times["away"]
