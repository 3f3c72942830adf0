"""A page to play with: a story streams in, each token in the colour of the expert that took it.

`python -m trainer.play --checkpoint runs/tiny` prints the page's address to stdout; Ctrl-C ends it. Needs the extra
`play` (gradio). Neither the page nor this process asks anything of any other machine.

1. `Routes` hears from the routers, while `generate` runs, which experts take each token.
2. `Story` keeps that beside the tokens, so that another layer's colours need no new story.
3. `markup` makes HTML of it, text escaped; `page` puts knobs beside it, `serve` gives it out.
"""

import errno
import ipaddress
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from data.settings import UserError
from data.tokenizer import StreamDecoder
from trainer.cli import Parser, add_checkpoint, add_device, guarded
from trainer.fault_tolerance.launcher import exit_now
from trainer.generate import Sampling, generate

if TYPE_CHECKING:
    import gradio
    from torch import nn

    from data.tokenizer import Tokenizer
    from model.moe import Routing
    from model.transformer import Transformer

PORTS = range(7860, 7960)  # tried in turn, as gradio does
PAUSE = 0.05  # seconds between two pictures of a story, at least
LONGEST = 2000  # tokens of a story, at most: each picture shows it whole
KNOBS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float}
KNOBS |= {"seed": int}
Experts = dict[int, list[tuple[int, ...]]]  # layer -> for each token the experts (K) that took it, the best first


class Span(NamedTuple):
    """Text that its tokens `start` to `stop` spell: mostly one, several where they share a character."""

    text: str
    start: int
    stop: int


def spans(tokenizer: "Tokenizer", ids: Sequence[int], ended: bool = True) -> Iterator[Span]:
    """The text of ids in parts that hold whole characters; what is still half a character waits for `ended`."""
    decoder, start = StreamDecoder(tokenizer), 0
    for place, token in enumerate(ids):
        if text := decoder.add(token):
            yield Span(text, start, place + 1)
            start = place + 1
    if ended and (text := decoder.flush()):
        yield Span(text, min(start, len(ids) - 1), len(ids))


class Routes:
    """Hears which experts take the tokens of a model, in `layers`, those that have experts.

    Stories of several visitors take turns token by token, so each hears of its own alone.
    """

    def __init__(self, model: "Transformer") -> None:
        from model.moe import MoE

        self._turn = threading.Lock()
        self._heard: Experts = {}
        for layer, block in enumerate(model.blocks):
            if isinstance(block.feed_forward, MoE):
                self._heard[layer] = []
                block.feed_forward.router.register_forward_hook(partial(self._hear, layer))
        self.layers = list(self._heard)

    def _hear(self, layer: int, router: "nn.Module", inputs: object, routing: "Routing") -> None:
        self._heard[layer] += map(tuple, routing.experts.tolist())

    def step(self, tokens: Iterator[int]) -> tuple[int | None, Experts]:
        """The next token, None at the end, and who took the tokens that were computed for it."""
        with self._turn:
            for heard in self._heard.values():
                heard.clear()
            token = next(tokens, None)
            return token, {layer: list(heard) for layer, heard in self._heard.items()}


@dataclass
class Story:
    """What one visitor looks at: tokens of a prompt and of what follows it, and who took them in each layer."""

    layer: int | None = None  # the one that is shown
    ids: list[int] = field(default_factory=list)  # without bos
    experts: Experts = field(default_factory=dict)  # of bos, then of ids as far as they are computed: not of the last
    prompt: int = 0  # how many of ids are the prompt's
    note: str = ""
    running: bool = False
    stop: bool = False


def write(
    story: Story, model: "Transformer", tokenizer: "Tokenizer", routes: Routes, prompt: str, sampling: Sampling
) -> Iterator[None]:
    """Lets the story grow, and pauses where it is worth a look. Ends early when someone sets `story.stop`."""
    story.ids, story.experts = tokenizer.encode(prompt), {layer: [] for layer in routes.layers}
    story.prompt, story.note, story.running, story.stop = len(story.ids), "writing", True, False
    tokens, shown = generate(model, tokenizer, prompt, sampling), 0.0
    try:
        while not story.stop:
            token, experts = routes.step(tokens)
            for layer, took in experts.items():
                story.experts[layer] += took
            if token is None:
                break
            story.ids.append(token)
            if time.monotonic() - shown > PAUSE:
                yield
                shown = time.monotonic()
    finally:  # also when the visitor has gone
        story.running = False
        count = len(story.ids) - story.prompt
        story.note = f"{count} token{'s' * (count != 1)}"
        print(f"a story of {story.note}", file=sys.stderr)
    yield


def markup(story: Story, tokenizer: "Tokenizer", n_experts: int) -> str:
    """The experts and their loads, then the story as HTML: a span for each part, its classes the experts."""
    took = [] if story.layer is None else story.experts.get(story.layer, [])[1:]
    parts = []
    for text, start, stop in spans(tokenizer, story.ids, not story.running):
        best = took[start] if start < len(took) else ()
        classes = ["prompt"] * (start < story.prompt) + [f"{k}{expert}" for k, expert in zip("ef", best, strict=False)]
        title = "\n".join([json.dumps(text, ensure_ascii=False), *who(took[start:stop], story.layer)])
        parts.append(f'<span class="{" ".join(classes)}" title="{escape(title)}">{escape(text)}</span>')
    loads = Counter(expert for experts in took for expert in experts)
    legend = [
        f'<span class="e{expert}{" idle" * (not loads[expert])}" title="expert {expert}: '
        f'{loads[expert]} of {len(took)} tokens">{expert}</span>'
        for expert in range(n_experts if story.layer is not None else 0)
    ]
    return (
        f'<div id="legend">{"".join(legend)}</div><div id="story"{" class=running" * story.running}>'
        f'{"".join(parts)}</div><div id="note">{escape(story.note)}</div>'
    )


def who(took: Sequence[tuple[int, ...]], layer: int | None) -> Iterator[str]:
    """A line for each token of a span."""
    if layer is not None and not took:
        yield f"layer {layer}: no expert has seen it yet"
    for experts in took:
        yield f"layer {layer}: expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))}"


def colour(expert: int, n_experts: int, dark: bool = False) -> tuple[float, float, float]:
    """Lightness, chroma and hue (degrees) in OKLCH: three rings of hues, neighbours on different rings."""
    ring, place = expert % 3, expert // 3
    per_ring = -(-n_experts // 3)
    hue = 360 * (place + ring / 3) / per_ring
    if dark:
        return (0.29, 0.38, 0.47)[ring], (0.065, 0.09, 0.11)[ring], hue
    return (0.94, 0.85, 0.76)[ring], (0.055, 0.10, 0.13)[ring], hue


def style(n_experts: int) -> str:
    """The page's CSS: how a story looks, and each expert's colours; a second expert is a line below the token."""
    rules = [LOOK]
    for where, expert in product(("", ".dark "), range(n_experts)):
        tone = "oklch({:.3f} {:.3f} {:.1f})".format(*colour(expert, n_experts, bool(where)))
        rules.append(f"{where}.e{expert} {{ background: {tone} }} {where}.f{expert} {{ --second: {tone} }}")
    return "\n".join(rules)


LOOK = """
.gradio-container main { max-width: 1060px; margin: 0 auto !important; }
#head { font-size: 14px; opacity: .75; } #head b { font-size: 20px; font-weight: 600; margin-right: .6em; }
#story { font-size: 18px; line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; min-height: 9em; }
#story span { border-radius: 3px; padding: 1px 0; border-bottom: 3px solid var(--second, transparent); }
#story .prompt { font-weight: 600; }
#story.running::after { content: "\\258d"; opacity: .4; }
#note { font-size: 13px; opacity: .6; min-height: 1.6em; margin-top: .5em; }
#legend { display: flex; flex-wrap: wrap; gap: 3px; margin-bottom: .75em; }
#legend span { font-size: 11px; min-width: 24px; text-align: center; border-radius: 3px; padding: 0 3px; }
#legend .idle { opacity: .35; }
"""


def page(model: "Transformer", tokenizer: "Tokenizer", name: str) -> "gradio.Blocks":
    """The page: prompt, story, layer and knobs. Each visitor has a `Story` of their own."""
    import gradio as gr

    model.requires_grad_(False).eval()  # no_grad is a thread's, and each step may have another
    routes, config = Routes(model), model.config
    first = routes.layers[0] if routes.layers else None
    look = partial(markup, tokenizer=tokenizer, n_experts=config.n_experts)

    def start(story: Story, prompt: str, *values: Any) -> Iterator[str]:
        try:
            requested = Sampling(**{knob: KNOBS[knob](value or 0) for knob, value in zip(KNOBS, values, strict=True)})
            for _ in write(story, model, tokenizer, routes, prompt, requested):
                yield look(story)
        except UserError as error:
            story.note = str(error).removeprefix("--")
            yield look(story)

    def stop(story: Story) -> None:
        story.stop = True

    def recolour(story: Story, layer: int) -> str:
        story.layer = layer
        return look(story)

    experts = f"{config.n_experts} experts, {config.top_k} for each token" if routes.layers else "no experts"
    words = f"<b>{escape(name)}</b>{config.n_layers} layers, {experts}"
    default = Sampling()
    with gr.Blocks(title=name, analytics_enabled=False, fill_width=True) as blocks:
        story = gr.State(Story(first))
        gr.HTML(words, elem_id="head", js_on_load=None)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                prompt = gr.Textbox("Once upon a time", label="Prompt", lines=2, max_lines=8, elem_id="prompt")
                with gr.Row():
                    go = gr.Button("Write", variant="primary", elem_id="write", min_width=80)
                    halt = gr.Button("Stop", elem_id="stop", min_width=80)
                kind = gr.Radio if len(routes.layers) <= 12 else gr.Dropdown
                layer = kind(routes.layers, value=first, label="Colours of layer", visible=first is not None)
                shown = gr.HTML(look(Story(first)), js_on_load=None)
            with gr.Column(scale=1, min_width=250):
                most = min(LONGEST, config.max_seq_len)
                slider = partial(gr.Slider, buttons=[])
                knobs = [
                    slider(1, most, min(default.max_new_tokens, most), step=1, label="New tokens"),
                    slider(0, 2, default.temperature, step=0.05, label="Temperature", info="0 is greedy"),
                    slider(0, 200, default.top_k, step=1, label="Top-k", info="0 keeps all"),
                    slider(0.05, 1, default.top_p, step=0.05, label="Top-p"),
                    slider(1, 2, default.repetition_penalty, step=0.05, label="Repetition penalty"),
                    gr.Number(default.seed, label="Seed", precision=0, minimum=0, maximum=2**53),
                ]
        quiet: Any = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        gr.on([go.click, prompt.submit], start, [story, prompt, *knobs], shown, **quiet)
        halt.click(stop, story, None, **quiet)
        layer.input(recolour, [story, layer], shown, **quiet)
    return blocks


def listen(host: str, port: int | None) -> socket.socket:
    """A socket at host and port, or at the first of PORTS that is free. Raises UserError."""
    for choice in PORTS if port is None else [port]:
        try:
            return socket.create_server((host, choice), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(f"--host {host}: {error.strerror}; the default, 127.0.0.1, is this machine") from None
            why = os.strerror(error.errno).lower()
    raise UserError(f"--port {choice}: {why} at {host}; give another, or none for the first free from {PORTS[0]}")


def serve(blocks: "gradio.Blocks", n_experts: int, ear: socket.socket) -> None:
    """Gives out the page until Ctrl-C. Not by `Blocks.launch`, which asks by way of proxies whether it is there."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    host, port = ear.getsockname()[:2]
    font, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # the reader's own
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        "/",
        host,
        port,
        show_error=False,
        theme=gr.themes.Default(primary_hue="slate", neutral_hue="slate", font=font, font_mono=mono),
        css=style(n_experts),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        max_file_size=0,
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [ear]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    if server.started:
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if not ipaddress.ip_address(host).is_loopback:
        print("whoever reaches this machine can use the page", file=sys.stderr)
    thread.join()


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m trainer.play", description="A page that shows who takes each token.")
    add_checkpoint(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, help=f"default: the first free one from {PORTS[0]}")
    from trainer.checkpoint.load import load_model

    add_device(parser)
    args = parser.parse_args(argv)
    if args.port is not None and not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port}: give one from 1 to 65535, or 0 for any that is free")
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("the page needs gradio, which is not installed: pip install -e '.[play]'") from None

    with listen(args.host, args.port) as ear:
        model, tokenizer, _ = load_model(args.checkpoint, args.device)
        try:
            serve(page(model, tokenizer, args.checkpoint.resolve().name), model.config.n_experts, ear)
        except KeyboardInterrupt:  # the way to end it
            print("the page is closed", file=sys.stderr)
            return 0
    return 1


if __name__ == "__main__":
    exit_now(guarded(main))
