"""Functions of the tests of parallelism that the processes of the pool run, each on every rank."""

from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.context import ForwardContext
from model.moe import Experts, MoE
from model.random import sequence_keys, site_keys
from parallel import collectives, fsdp, gradients
from parallel.build import build_model
from parallel.experts import AllToAllExchange, ExpertPlacement, Transfer, distribute, parameter_as_global_dtensor
from parallel.mesh import World, make_mesh, resolve_degrees
from parallel.recompute import recompute_parts
from trainer.checkpoint.load import weights_digest

SMALL = dict(
    dim=16, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=24, expert_dim=20, n_experts=5, moe_every=2, max_seq_len=32
)
VOCAB = 40


def build(
    replicate=1,
    dtype=torch.float32,
    one_unit_bytes=0,
    expert=1,
    overlap=True,
    recompute="none",
    compile=False,
    **keys,
):
    """A model whose blocks are FSDP units, as those of a large model; one_unit_bytes=1 << 30 makes it a single unit."""
    world, config, cpu = World.from_environment(), ModelConfig(**{**SMALL, **keys}), torch.device("cpu")
    layout = make_mesh(resolve_degrees(world, config, replicate, "auto", expert), cpu)
    # The patch ends with the build, because these processes run other tests, too.
    with mock.patch.object(fsdp, "ONE_UNIT_BYTES", one_unit_bytes):
        return build_model(config, VOCAB, 3, cpu, dtype, layout, overlap, recompute, compile), world


def initial_digest(**keys) -> str:
    return weights_digest(build(**keys)[0])


def one_step(replicate=1, reduce="once", micro_batches=3, **keys):
    """Gradients (in full, by name), norm and loss of one global batch of 6 rows, split into micro-batches."""
    model, world = build(replicate, **keys)
    tokens = torch.randint(0, VOCAB, (6, 17), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, 3:] = -100  # ranks with unequal numbers of real tokens
    real_tokens = int((targets != -100).sum())
    local_rows = slice(world.rank * 6 // world.size, (world.rank + 1) * 6 // world.size)
    loss = torch.zeros((), dtype=torch.float64)
    chunks = torch.arange(6)[local_rows].tensor_split(micro_batches)
    for number, rows in enumerate(chunks):
        fsdp.set_gradient_sync(model, number == len(chunks) - 1 or reduce == "every")
        output = model(tokens[rows, :-1], targets[rows])
        (output.loss / real_tokens).backward()
        loss += output.loss.detach().double() / real_tokens
    gradients.sum_replicated(model)
    square, loss = collectives.sum_over_ranks(gradients.sum_of_squares(model, replicate), loss)
    grads = {}
    for name, p in model.named_parameters():
        grad = parameter_as_global_dtensor(model, name, p.grad)
        grads[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).numpy()
    return {"grads": grads, "norm": float(square.sqrt()), "loss": float(loss)}


def broadcast_if_ranks_disagree():
    """The results on this rank of two broadcasts of values that differ between ranks."""
    rank = World.from_environment().rank
    return collectives.broadcast(rank == 0), collectives.broadcast(rank != 0)


def router_dtypes(**keys):
    """The dtypes in router and experts of a model that computes in bf16."""
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
    """Whether weights are sharded after `gathered`, logits are equal inside and outside, and a backward works later."""
    model, _ = build(**keys)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        outside = model(tokens).logits
        with fsdp.gathered(model):
            inside = [model(tokens).logits for _ in range(3)]
    replicated = set(fsdp.replicated_parameters(model))
    sharded = all(hasattr(p, "placements") != (p in replicated) for p in model.parameters())
    model(tokens, tokens).loss.backward()
    return sharded, all(torch.equal(x, outside) for x in inside), all(p.grad is not None for p in model.parameters())


def max_abs(x):
    """The largest absolute number of x."""
    return float(x.detach().abs().max()) if x.numel() else 0.0


def exchange(counts, padding, dtype, overlap):
    """Rows sent through the exchange to experts on other ranks, compared with all experts on one rank.

    counts (ranks, E) are the rows of each rank for each expert, padding (ranks,) the rows beyond them. Returns the
    largest differences of results, of the rows' gradients and of the weights' gradients, and whether no transfer is in
    flight at the end.
    """
    world, dtype = World.from_environment(), getattr(torch, dtype)
    n_experts, loads = len(counts[0]), torch.tensor(counts[world.rank])
    placement = ExpertPlacement(n_experts, world.size)
    config = ModelConfig(dim=8, n_heads=2, expert_dim=4, n_experts=n_experts)
    all_experts, local_experts = Experts(config).to(dtype), Experts(config).to(dtype)
    local_experts.resize(placement.slots)
    first, owned = world.rank * placement.slots, placement.owned(world.rank)
    for weight, slots in zip(all_experts.parameters(), local_experts.parameters(), strict=True):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            slots.zero_()[:owned] = weight[first : first + owned]
    n_real = int(loads.sum())
    generator = torch.Generator().manual_seed(2 + world.rank)
    rows = torch.randn(n_real + padding[world.rank], 8, dtype=dtype, generator=generator, requires_grad=True)
    direction = torch.randn(n_real, 8, dtype=dtype, generator=generator)
    sent_rows = rows.detach().clone().requires_grad_()
    expected = all_experts(rows, loads)[:n_real]
    (expected * direction).sum().backward()
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("expert",))
    all_to_all = AllToAllExchange(placement, mesh, overlap)
    dispatching = all_to_all.dispatch(sent_rows, loads)
    combining = all_to_all.combine(local_experts(*dispatching.wait()), dispatching)
    result = combining.wait()
    assert result.shape == rows.shape
    (result[:n_real] * direction).sum().backward()
    differences = [max_abs(result[:n_real] - expected), max_abs((sent_rows.grad - rows.grad)[:n_real])]
    for weight, slots in zip(all_experts.parameters(), local_experts.parameters(), strict=True):
        dist.all_reduce(weight.grad)
        differences.append(max_abs(slots.grad[:owned] - weight.grad[first : first + owned]))
        differences.append(max_abs(slots.grad[owned:]))
    transfers = (dispatching.transfer, combining.transfer)
    return differences, all(transfer.in_flight is None for transfer in transfers)


def moe_on_all_ranks(world, mode, overlap=True, **keys):
    """An MoE whose experts are spread over all ranks, without FSDP, with recomputation `mode`; and a context."""
    config = ModelConfig(**{**SMALL, "moe_every": 1, "n_layers": 1, "n_experts": 3, **keys})
    with torch.device("meta"):
        model = fsdp.Transformer(config, VOCAB)
    recompute_parts(model, mode)
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("expert",))
    distribute(model, ExpertPlacement(config.n_experts, world.size), mesh, overlap)
    model.to_empty(device="cpu")
    model.init_weights(0)  # the experts of all ranks are equal here
    moe = model.blocks[0].feed_forward
    assert isinstance(moe, MoE)
    return moe, ForwardContext.create(config, torch.zeros(2, 8, config.dim))


def moe_events(mode, overlap):
    """The events of an MoE's forward and backward, and whether each transfer was done when its start returned."""
    moe, context = moe_on_all_ranks(World.from_environment(), mode, overlap)
    seen, done = [], []
    start, finish = Transfer.start, Transfer.finish
    project_up, project_down = moe.shared.project_up, moe.shared.project_down

    def recorded_start(transfer, rows, backward=False):
        start(transfer, rows, backward)
        seen.append(f"{transfer.name} start")
        done.append(transfer.in_flight[0].is_completed())

    def recorded_finish(transfer):
        seen.append(f"{transfer.name} finish")
        return finish(transfer)

    def recorded_up(x):
        hidden = project_up(x)
        seen.append("up")
        return hidden

    def recorded_down(hidden):
        out = project_down(hidden)
        seen.append("down")
        return out

    moe.shared.project_up, moe.shared.project_down = recorded_up, recorded_down
    moe.shared.gate_up.register_hook(lambda grad: seen.append("up"))
    moe.shared.down.register_hook(lambda grad: seen.append("down"))
    moe.experts.down.register_hook(lambda grad: seen.append("experts"))
    x = torch.randn(2, 8, SMALL["dim"], requires_grad=True)
    with mock.patch.object(Transfer, "start", recorded_start), mock.patch.object(Transfer, "finish", recorded_finish):
        out, _, _ = moe(x, context)
        seen.append("backward")
        out.sum().backward()
    return seen, done


class WaitRecorder(TorchDispatchMode):
    """Records the operations for which the host would wait for a device."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in self.WAIT:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def operations_that_wait(mode):
    """The operations of an MoE's forward and backward that wait, and how often the exchange reads its splits."""
    moe, context = moe_on_all_ranks(World.from_environment(), mode, expert_dim=16)
    read_splits = AllToAllExchange.read_splits
    reads = []

    def recorded_read(exchange, sent, received):
        result = read_splits(exchange, sent, received)
        reads.append(result)
        return result

    x = torch.randn(2, 8, SMALL["dim"], requires_grad=True)
    with mock.patch.object(AllToAllExchange, "read_splits", recorded_read), WaitRecorder() as host:
        out, _, _ = moe(x, context)
        out.sum().backward()
    return host.seen, len(reads)


class MessageCounter(TorchDispatchMode):
    """Counts the messages of each kind, and the bytes that this rank sends to other ranks."""

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
            _, sent, boxed_group, _, send_splits, *_ = args
            group = dist.ProcessGroup.unbox(boxed_group)
            if not send_splits:
                send_splits = [len(sent) // group.size()] * group.size()
            rows_to_others = sum(send_splits) - send_splits[group.rank()]
            size = rows_to_others * sent[0].numel() * sent.element_size() if len(sent) else 0
        elif name in ("_allgather_base_", "_reduce_scatter_base_"):
            whole = max(args[0].numel() * args[0].element_size(), args[1].numel() * args[1].element_size())
            ranks = dist.ProcessGroup.unbox(args[2]).size()
            size = whole * (ranks - 1) // ranks
        else:
            return
        self.bytes[name] = self.bytes.get(name, 0) + size


def count_messages(micro_batches=2, **keys):
    """The messages and bytes of one step, by kind, and the loads (layers, E) of this rank's tokens."""
    model, world = build(**keys)
    model.train()
    tokens = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(world.rank))
    loads = 0
    with MessageCounter() as seen:
        for number in range(micro_batches):
            fsdp.set_gradient_sync(model, number == micro_batches - 1)
            output = model(tokens, tokens)
            output.loss.backward()
            loads = loads + output.loads
    return seen.messages, seen.bytes, loads.tolist()


def recomputation_keeps_choice(mode):
    """Whether gradients stay the same if the biases change before the backward, and how many experts were chosen.

    All tokens of the batch are equal.
    """
    world, grads = World.from_environment(), []
    for change in (0.0, 1.0):
        moe, context = moe_on_all_ranks(world, mode)
        x = torch.ones(2, 8, SMALL["dim"], requires_grad=True)
        out, loads, _ = moe(x, context)
        moe.router.bias -= change * loads  # if the router picked again, it would pick other experts
        out.square().sum().backward()
        grads.append([x.grad.clone(), *(p.grad.clone() for p in moe.parameters())])
    return all(torch.equal(a, b) for a, b in zip(*grads, strict=True)), int((loads > 0).sum())


def send_all_tokens_to_one_expert(to, **keys):
    """Loads, and whether gradients are finite, if expert `to` receives all tokens, and the last rank has no targets."""
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


def compare_compiled(**keys):
    """Three micro-batches with stories of different lengths, first uncompiled, then compiled.

    Returns the losses of both, the largest relative distance of their gradients, the number of compiled graphs after
    the first micro-batch and after all of them (and a shorter one in evaluation), and the reasons for graph breaks.
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
            vocab_size = VOCAB if number < 2 else 2  # so few different tokens that some experts are idle
            tokens = torch.randint(0, vocab_size, (2, 16), generator=g)
            documents = torch.sort(torch.randint(0, 4, (2, 16), generator=g)).values
            positions = torch.arange(16)[None].expand(2, -1)
            torch.manual_seed(number)
            rng_keys = site_keys(sequence_keys(0, number, torch.arange(2)), model.config.n_layers)
            with mock.patch.object(torch._inductor.config, "compile_threads", 1):
                loss = model(tokens, tokens, positions, documents, rng_keys).loss
                loss.backward()
            losses.append(loss.item())
            graphs.append(counters["stats"]["unique_graphs"])
        results.append((losses, [fsdp.to_local(p.grad) for p in model.parameters()]))
    model.eval()
    model(tokens[:, :7])
    graphs.append(counters["stats"]["unique_graphs"])
    (plain_losses, plain_grads), (compiled_losses, compiled_grads) = results
    pairs = zip(compiled_grads, plain_grads, strict=True)
    distance = max(float((a - b).norm() / b.norm()) for a, b in pairs if b.norm())
    return plain_losses, compiled_losses, distance, (graphs[3], graphs[-1]), dict(counters["graph_break"])


def expert_shapes(**keys):
    """For each weight of the experts by name, its shape on this rank, and in the whole model."""
    model, _ = build(**keys)
    found = {}
    for name, p in model.named_parameters():
        if ".experts." in name:
            found[name] = tuple(fsdp.to_local(p).shape), tuple(parameter_as_global_dtensor(model, name, p).shape)
    return found


def recomputed_on_one_rank(mode):
    """The loss of a bf16 model that FSDP wraps on one rank, whether its gradients are finite, and its FSDP units.

    A run of one process is not wrapped. Here it is, because an FSDP unit inside of a recomputed part behaves
    differently the second time: on CUDA this shows on any number of ranks, but on a CPU only on one rank.
    """
    from tests.gpu.check.project import one_rank_world

    cpu = torch.device("cpu")
    with one_rank_world(cpu) as layout:
        model = build_model(ModelConfig(**SMALL), VOCAB, 3, cpu, torch.bfloat16, layout, recompute=mode).train()
        tokens = torch.arange(32).view(2, 16) % VOCAB
        loss = model(tokens, tokens).loss
        loss.backward()
        finite = all(bool(fsdp.to_local(p.grad).isfinite().all()) for p in model.parameters())
        units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    return loss.item(), finite, units
