"""What the pool's processes run; each function on every rank."""

from unittest import mock

import torch

from model.config import ModelConfig
from parallel import fsdp, gradients, mesh
from parallel.experts import logical
from parallel.mesh import World, degrees, make_mesh
from trainer.checkpoint import digest

SMALL = dict(
    dim=16, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=24, expert_dim=20, n_experts=5, moe_every=2, max_seq_len=32
)
VOCAB = 40


def build(replicate=1, dtype=torch.float32, small=0, expert=1, overlap=True, recompute="none", **keys):
    """A model in units by block, as large ones are; small=1 << 30 for a single unit."""
    world, config, cpu = World.from_environment(), ModelConfig(**{**SMALL, **keys}), torch.device("cpu")
    layout = make_mesh(degrees(world, config, replicate, "auto", expert), cpu)
    with mock.patch.object(fsdp, "SMALL", small):  # set back at once: these processes serve other tests too
        return fsdp.build(config, VOCAB, 3, cpu, dtype, layout, overlap, recompute), world


def initial_digest(**keys) -> str:
    return digest(build(**keys)[0])


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
        fsdp.reduce_gradients(model, number == len(chunks) - 1 or reduce == "every")
        output = model(tokens[rows, :-1], targets[rows])
        (output.loss / real).backward()
        loss += output.loss.detach().double() / real
    parts = gradients.local_gradients(model)
    square, loss = gradients.sum_over_ranks(gradients.sum_of_squares(parts, replicate), loss)
    grads = {}
    for name, p in model.named_parameters():
        grad = logical(model, name, p.grad)
        grads[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).numpy()
    return {"grads": grads, "norm": float(square.sqrt()), "loss": float(loss)}


def agreed():
    """What ranks of different minds settle on."""
    rank = World.from_environment().rank
    return mesh.agree(rank == 0), mesh.agree(rank != 0)


def router_dtypes(**keys):
    """dtypes seen by router and experts of a model that computes in bf16."""
    model, _ = build(dtype=torch.bfloat16, **keys)
    seen = {}
    moe = next(b.feed_forward for b in model.blocks if hasattr(b.feed_forward, "router"))
    moe.router.register_forward_hook(lambda m, i, out: seen.update(weight=m.weight.dtype, scores=out[0].dtype))
    moe.experts.register_forward_hook(lambda m, i, out: seen.update(experts=m.down.dtype, rows=out.dtype))
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
    sharded = all(hasattr(p, "placements") for p in model.parameters())
    model(tokens, tokens).loss.backward()
    return sharded, all(torch.equal(x, outside) for x in inside), all(p.grad is not None for p in model.parameters())
