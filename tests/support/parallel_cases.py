"""What the pool's processes run; each function on every rank."""

from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.moe import Experts, MoE
from model.random import sequence_keys, site_keys
from parallel import collectives, fsdp, gradients
from parallel.build import build_model
from parallel.experts import Exchange, ExpertPlacement, _Leg, as_global_dtensor, distribute
from parallel.mesh import World, make_mesh, resolve_degrees
from parallel.recompute import recompute
from trainer.checkpoint.load import weights_digest

SMALL = dict(
    dim=16, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=24, expert_dim=20, n_experts=5, moe_every=2, max_seq_len=32
)
VOCAB = 40


def build(replicate=1, dtype=torch.float32, small=0, expert=1, overlap=True, recompute="none", compile=False, **keys):
    """A model in units by block, as large ones are; small=1 << 30 for a single unit."""
    world, config, cpu = World.from_environment(), ModelConfig(**{**SMALL, **keys}), torch.device("cpu")
    layout = make_mesh(resolve_degrees(world, config, replicate, "auto", expert), cpu)
    with mock.patch.object(fsdp, "ONE_UNIT_BYTES", small):  # set back at once: these processes serve other tests too
        return build_model(config, VOCAB, 3, cpu, dtype, layout, overlap, recompute, compile), world


def initial_digest(**keys) -> str:
    return weights_digest(build(**keys)[0])


def one_step(replicate=1, reduce="once", micro_batches=3, **keys):
    """Gradients (whole, by name), norm and loss of one global batch of 6 rows cut into micro-batches."""
    model, world = build(replicate, **keys)
    tokens = torch.randint(0, VOCAB, (6, 17), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, 3:] = -100  # ranks with unequal numbers of real tokens
    real = int((targets != -100).sum())
    mine = slice(world.rank * 6 // world.size, (world.rank + 1) * 6 // world.size)
    loss = torch.zeros((), dtype=torch.float64)
    chunks = torch.arange(6)[mine].tensor_split(micro_batches)
    for number, rows in enumerate(chunks):
        fsdp.set_gradient_sync(model, number == len(chunks) - 1 or reduce == "every")
        output = model(tokens[rows, :-1], targets[rows])
        (output.loss / real).backward()
        loss += output.loss.detach().double() / real
    gradients.sum_replicated(model)
    square, loss = collectives.sum_over_ranks(gradients.sum_of_squares(model, replicate), loss)
    grads = {}
    for name, p in model.named_parameters():
        grad = as_global_dtensor(model, name, p.grad)
        grads[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).numpy()
    return {"grads": grads, "norm": float(square.sqrt()), "loss": float(loss)}


def agreed():
    """What ranks of different minds settle on."""
    rank = World.from_environment().rank
    return collectives.broadcast(rank == 0), collectives.broadcast(rank != 0)


def router_dtypes(**keys):
    """dtypes seen by router and experts of a model that computes in bf16."""
    model, _ = build(dtype=torch.bfloat16, **keys)
    seen = {}
    moe = next(b.feed_forward for b in model.blocks if hasattr(b.feed_forward, "router"))
    moe.router.register_forward_hook(lambda m, i, out: seen.update(weight=m.weight.dtype, scores=out[0].dtype))
    moe.experts.register_forward_hook(lambda m, i, out: seen.update(experts=m.down.to(out).dtype, rows=out.dtype))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    loss = model(tokens, tokens).loss
    loss.backward()
    seen.update(loss=loss.dtype, grad=next(model.parameters()).grad.dtype)
    return {k: str(v) for k, v in seen.items()}


def gathered_leaves_the_model_sharded(**keys):
    """Logits inside and outside of `gathered`, and whether training goes on after it."""
    model, _ = build(**keys)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        outside = model(tokens).logits
        with fsdp.gathered(model):
            inside = [model(tokens).logits for _ in range(3)]
    whole = set(fsdp.replicated_parameters(model))
    sharded = all(hasattr(p, "placements") != (p in whole) for p in model.parameters())
    model(tokens, tokens).loss.backward()
    return sharded, all(torch.equal(x, outside) for x in inside), all(p.grad is not None for p in model.parameters())


def exchange(counts, nobodys, dtype, overlap):
    """Rows through the exchange and the experts of their owners, against all experts at home.

    counts (ranks, E) rows of each rank for each expert, nobodys (ranks,) rows beyond them. Returns the largest
    differences of results, of the rows' gradients and of the weights' gradients, and whether nothing is in flight.
    """
    world, dtype = World.from_environment(), getattr(torch, dtype)
    n_experts, mine = len(counts[0]), torch.tensor(counts[world.rank])
    owners = ExpertPlacement(n_experts, world.size)
    config = ModelConfig(dim=8, n_heads=2, expert_dim=4, n_experts=n_experts)
    home, away = Experts(config).to(dtype), Experts(config).to(dtype)
    first, owned = world.rank * owners.slots, owners.owned(world.rank)
    for name, weight in home.named_parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
        slots = torch.zeros(owners.slots, *weight.shape[1:], dtype=dtype)
        slots[:owned] = weight.detach()[first : first + owned]
        setattr(away, name, torch.nn.Parameter(slots))
    g, n = torch.Generator().manual_seed(2 + world.rank), int(mine.sum())
    rows = torch.randn(n + nobodys[world.rank], 8, dtype=dtype, generator=g, requires_grad=True)
    direction = torch.randn(n, 8, dtype=dtype, generator=g)
    other = rows.detach().clone().requires_grad_()
    want = home(rows, mine)[:n]
    (want * direction).sum().backward()
    trip = Exchange(owners, init_device_mesh("cpu", (world.size,), mesh_dim_names=("expert",)), overlap)(other, mine)
    trip.send_back(away(*trip.arrive()))
    got = trip.home()
    assert got.shape == rows.shape
    (got[:n] * direction).sum().backward()

    def most(x):
        return float(x.detach().abs().max()) if x.numel() else 0.0

    differences = [most(got[:n] - want), most((other.grad - rows.grad)[:n])]
    for weight, slots in zip(home.parameters(), away.parameters(), strict=True):
        dist.all_reduce(weight.grad)
        differences.append(most(slots.grad[:owned] - weight.grad[first : first + owned]))
        differences.append(most(slots.grad[owned:]))
    return differences, trip.out.flight is None and trip.back.flight is None


def moe(world, mode, overlap=True, **keys):
    """An MoE whose experts are spread over all ranks, without FSDP, and its recomputation."""
    config = ModelConfig(**{**SMALL, "moe_every": 1, "n_layers": 1, "n_experts": 3, **keys})
    with torch.device("meta"):
        model = fsdp.Transformer(config, VOCAB)
    recompute(model, mode)
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("expert",))
    distribute(model, ExpertPlacement(config.n_experts, world.size), mesh, overlap)
    model.to_empty(device="cpu")
    model.init_weights(0)  # the experts of all ranks are alike here
    inner = model.blocks[0].feed_forward
    assert isinstance(inner, MoE)
    return inner


def events(mode, overlap):
    """What happens in one forward and backward of an MoE, in order; starts that were done when they returned."""
    inner, told, done = moe(World.from_environment(), mode, overlap), [], []
    start, finish, widen, narrow = _Leg.start, _Leg.finish, inner.shared.widen, inner.shared.narrow

    def watched_start(leg, rows, reverse=False):
        start(leg, rows, reverse)
        told.append(f"{leg.name} start")
        done.append(leg.flight[0].is_completed())

    def watched_finish(leg):
        told.append(f"{leg.name} finish")
        return finish(leg)

    inner.shared.widen = lambda x: (widen(x), told.append("widen"))[0]
    inner.shared.narrow = lambda x: (narrow(x), told.append("narrow"))[0]
    inner.shared.gate_up.register_hook(lambda grad: told.append("widen"))
    inner.shared.down.register_hook(lambda grad: told.append("narrow"))
    inner.experts.down.register_hook(lambda grad: told.append("experts"))
    x = torch.randn(2, 8, SMALL["dim"], requires_grad=True)
    with mock.patch.object(_Leg, "start", watched_start), mock.patch.object(_Leg, "finish", watched_finish):
        out, _, _ = inner(x, torch.ones(2, 8, dtype=torch.bool))
        told.append("backward")
        out.sum().backward()
    return told, done


class HostReads(TorchDispatchMode):
    """Notes the operations that would make the host wait for a device."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in self.WAIT:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def host_reads(mode):
    """Operations of an MoE's forward and backward that wait, and how often the sizes of the exchange were read."""
    inner, reads = moe(World.from_environment(), mode, expert_dim=16), []
    sizes = Exchange.sizes
    x = torch.randn(2, 8, SMALL["dim"], requires_grad=True)
    with mock.patch.object(Exchange, "sizes", lambda *a: (reads.append(1), sizes(*a))[1]), HostReads() as host:
        inner(x, torch.ones(2, 8, dtype=torch.bool))[0].sum().backward()
    return host.seen, len(reads)


class Wire(TorchDispatchMode):
    """Counts messages by kind, and the bytes that this rank sends to others in each kind."""

    def __init__(self):
        super().__init__()
        self.messages, self.bytes = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.count(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def count(self, name, args):
        self.messages[name] = self.messages.get(name, 0) + 1
        if name == "alltoall_base_":
            _, leaving, group, _, to, *_ = args
            group = dist.ProcessGroup.unbox(group)
            to = to or [len(leaving) // group.size()] * group.size()
            size = (sum(to) - to[group.rank()]) * leaving[0].numel() * leaving.element_size() if len(leaving) else 0
        elif name in ("_allgather_base_", "_reduce_scatter_base_"):
            whole = max(args[0].numel() * args[0].element_size(), args[1].numel() * args[1].element_size())
            ranks = dist.ProcessGroup.unbox(args[2]).size()
            size = whole * (ranks - 1) // ranks
        else:
            return
        self.bytes[name] = self.bytes.get(name, 0) + size


def wire(micro_batches=2, **keys):
    """Messages and bytes of one step, by kind, and the loads (layers, E) of this rank's tokens in it."""
    model, world = build(**keys)
    model.train()
    tokens = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(world.rank))
    loads = 0
    with Wire() as seen:
        for number in range(micro_batches):
            fsdp.set_gradient_sync(model, number == micro_batches - 1)
            output = model(tokens, tokens)
            output.loss.backward()
            loads = loads + output.loads
    return seen.messages, seen.bytes, loads.tolist()


def choice_is_kept(mode):
    """Gradients of a batch of one repeated token, plainly, and with biases that change before the backward."""
    world, x, grads = World.from_environment(), torch.ones(2, 8, SMALL["dim"]), []
    for change in (0.0, 1.0):
        inner = moe(world, mode)
        y = x.clone().requires_grad_()
        out, loads, _ = inner(y, torch.ones(2, 8, dtype=torch.bool))
        inner.router.bias -= change * loads  # a recomputed choice would now be another one
        out.square().sum().backward()
        grads.append([y.grad.clone(), *(p.grad.clone() for p in inner.parameters())])
    return all(torch.equal(a, b) for a, b in zip(*grads, strict=True)), int((loads > 0).sum())


def forced(to, **keys):
    """Two steps with all tokens sent to one expert, and none of them real on the last rank: loads and gradients."""
    model, world = build(**keys)
    for block in model.blocks:
        if isinstance(block.feed_forward, MoE):
            block.feed_forward.router.bias[to] = 10.0
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    targets = tokens if world.rank < world.size - 1 else torch.full_like(tokens, -100)
    for _ in range(2):
        output = model(tokens, targets)
        output.loss.backward()
    finite = all(bool(fsdp.to_local(p.grad).isfinite().all()) for p in model.parameters())
    return output.loads.tolist(), finite


def compiled(**keys):
    """Three micro-batches of stories of other lengths, plainly and compiled.

    Returns the losses of both, the largest relative distance of their gradients, how many parts were compiled by the
    first micro-batch and by all (and a shorter one in evaluation), and why any of them broke in two.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    results, graphs = [], []
    for compile in (False, True):
        model, world = build(compile=compile, **keys)
        model.train()
        losses = []
        for number in range(3):
            g = torch.Generator().manual_seed(10 * world.rank + number)
            words = VOCAB if number < 2 else 2  # so few that experts are idle
            tokens = torch.randint(0, words, (2, 16), generator=g)
            documents = torch.sort(torch.randint(0, 4, (2, 16), generator=g)).values
            positions = torch.arange(16)[None].expand(2, -1)
            torch.manual_seed(number)
            sites = site_keys(sequence_keys(0, number, torch.arange(2)), model.config.n_layers)
            with mock.patch.object(torch._inductor.config, "compile_threads", 1):
                loss = model(tokens, tokens, positions, documents, sites).loss
                loss.backward()
            losses.append(loss.item())
            graphs.append(counters["stats"]["unique_graphs"])
        results.append((losses, [fsdp.to_local(p.grad) for p in model.parameters()]))
    model.eval()
    model(tokens[:, :7])
    graphs.append(counters["stats"]["unique_graphs"])
    (plain, want), (fast, got) = results
    far = max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True) if b.norm())
    return plain, fast, far, (graphs[3], graphs[-1]), dict(counters["graph_break"])


def whole_experts(**keys):
    """Shapes of the experts' weights as this rank has them, and as the whole model knows them."""
    model, _ = build(**keys)
    found = {}
    for name, p in model.named_parameters():
        if ".experts." in name:
            found[name] = tuple(fsdp.to_local(p).shape), tuple(as_global_dtensor(model, name, p).shape)
    return found


def recomputed_on_one_rank(mode):
    """Loss of a model that FSDP wraps on a world of one rank in bf16, whether its gradients are finite, and its units.

    A run of one process is not wrapped. Here it is, since ranges of FSDP inside of what is recomputed, which differ the
    second time, showed on any number of ranks on CUDA, but on a CPU on one rank alone.
    """
    from tests.gpu.check.project import one_rank_world

    cpu = torch.device("cpu")
    with one_rank_world(cpu) as layout:
        model = build_model(ModelConfig(**SMALL), VOCAB, 3, cpu, torch.bfloat16, layout, again=mode).train()
        tokens = torch.arange(32).view(2, 16) % VOCAB
        loss = model(tokens, tokens).loss
        loss.backward()
        finite = all(bool(fsdp.to_local(p.grad).isfinite().all()) for p in model.parameters())
        units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    return loss.item(), finite, units
