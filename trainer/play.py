"""A local web page that shows a model at work: a story streams in, each token in the colour of its expert.

`python -m trainer.play --checkpoint runs/tiny` prints the address of the page to stdout; Ctrl-C ends it. It needs the
extra `play` (gradio). Neither the page nor this process sends a request to another machine.

1. `RoutingRecorder` records the experts that the routers choose for each token while `generate` runs.
2. `Story` keeps the tokens and their experts, so that the colours of another layer need no new story.
3. `story_html` makes HTML of a story, with its text escaped. `build_page` adds the controls, and `serve` serves the
   page.
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

PORTS = range(7860, 7960)  # tried one after the other if no port is given; gradio has the same range
REFRESH_INTERVAL_S = 0.05  # the least time between two updates of a story on the page
MAX_NEW_TOKENS = 2000  # of a story, because each update sends the whole story
SAMPLING_TYPES = {  # of the values of the controls, in their order on the page
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
    "seed": int,
}
LayerExperts = dict[
    int, list[tuple[int, ...]]
]  # by layer: the experts (K) of each token, the one with best score first


class Span(NamedTuple):
    """Text of the tokens `start` up to `stop`: of one token, or of several tokens that share a character."""

    text: str
    start: int
    stop: int


def spans(tokenizer: "Tokenizer", ids: Sequence[int], is_complete: bool = True) -> Iterator[Span]:
    """The text of ids as spans of whole characters. An unfinished character at the end is yielded if `is_complete`."""
    decoder, start = StreamDecoder(tokenizer), 0
    for place, token in enumerate(ids):
        if text := decoder.add(token):
            yield Span(text, start, place + 1)
            start = place + 1
    if is_complete and (text := decoder.flush()):
        yield Span(text, min(start, len(ids) - 1), len(ids))


class RoutingRecorder:
    """Records which experts process the tokens of a model, in `layers`, which are the MoE layers.

    The stories of several visitors are generated in turn, a token at a time. `next_token` holds a lock, so each story
    gets the records of its own tokens only.
    """

    def __init__(self, model: "Transformer") -> None:
        from model.moe import MoE

        self._lock = threading.Lock()
        self._records: LayerExperts = {}
        for layer, block in enumerate(model.blocks):
            if isinstance(block.feed_forward, MoE):
                self._records[layer] = []
                block.feed_forward.router.register_forward_hook(partial(self._record, layer))
        self.layers = list(self._records)

    def _record(self, layer: int, router: "nn.Module", inputs: object, routing: "Routing") -> None:
        self._records[layer] += map(tuple, routing.experts.tolist())

    def next_token(self, tokens: Iterator[int]) -> tuple[int | None, LayerExperts]:
        """The next of `tokens`, or None at the end, and the experts of the tokens that were processed for it."""
        with self._lock:
            for records in self._records.values():
                records.clear()
            token = next(tokens, None)
            return token, {layer: list(records) for layer, records in self._records.items()}


@dataclass
class Story:
    """The story of one visitor: the tokens of the prompt and of its continuation, and their experts in each layer."""

    shown_layer: int | None = None  # whose experts colour the tokens
    ids: list[int] = field(default_factory=list)  # without bos
    experts: LayerExperts = field(default_factory=dict)  # of bos, then of ids; the last one may not be processed yet
    n_prompt: int = 0  # how many of ids are the prompt
    status: str = ""
    is_running: bool = False
    stop_requested: bool = False


def write_story(
    story: Story,
    model: "Transformer",
    tokenizer: "Tokenizer",
    recorder: RoutingRecorder,
    prompt: str,
    sampling: Sampling,
) -> Iterator[None]:
    """Generate `story`; yields when it is time to show it again. Ends early if another thread sets `stop_requested`."""
    story.ids = tokenizer.encode(prompt)
    story.n_prompt = len(story.ids)
    story.experts = {layer: [] for layer in recorder.layers}
    story.status, story.is_running, story.stop_requested = "writing", True, False
    tokens = generate(model, tokenizer, prompt, sampling)
    shown_at = 0.0
    try:
        while not story.stop_requested:
            token, experts = recorder.next_token(tokens)
            for layer, of_tokens in experts.items():
                story.experts[layer] += of_tokens
            if token is None:
                break
            story.ids.append(token)
            if time.monotonic() - shown_at > REFRESH_INTERVAL_S:
                yield
                shown_at = time.monotonic()
    finally:  # runs also if the visitor has closed the page, which closes this generator
        story.is_running = False
        count = len(story.ids) - story.n_prompt
        story.status = f"{count} token{'s' * (count != 1)}"
        print(f"generated {story.status}", file=sys.stderr)
    yield


def story_html(story: Story, tokenizer: "Tokenizer", n_experts: int) -> str:
    """The experts and their loads, then the story: a span of HTML for each `Span`, with its experts as classes."""
    experts = [] if story.shown_layer is None else story.experts.get(story.shown_layer, [])[1:]  # without that of bos
    story_spans = []
    for text, start, stop in spans(tokenizer, story.ids, is_complete=not story.is_running):
        classes = ["prompt"] if start < story.n_prompt else []
        if start < len(experts):
            classes += [f"{letter}{expert}" for letter, expert in zip("ef", experts[start], strict=False)]
        title = "\n".join(
            [json.dumps(text, ensure_ascii=False), *_expert_lines(experts[start:stop], story.shown_layer)]
        )
        story_spans.append(f'<span class="{" ".join(classes)}" title="{escape(title)}">{escape(text)}</span>')
    loads = Counter(expert for of_token in experts for expert in of_token)
    legend = [
        f'<span class="e{expert}{"" if loads[expert] else " idle"}" title="expert {expert}: '
        f'{loads[expert]} of {len(experts)} tokens">{expert}</span>'
        for expert in range(n_experts if story.shown_layer is not None else 0)
    ]
    return (
        f'<div id="legend">{"".join(legend)}</div><div id="story"{" class=running" if story.is_running else ""}>'
        f'{"".join(story_spans)}</div><div id="note">{escape(story.status)}</div>'
    )


def _expert_lines(experts: Sequence[tuple[int, ...]], layer: int | None) -> Iterator[str]:
    """A line about the experts of each token of a span."""
    if layer is not None and not experts:
        yield f"layer {layer}: not processed by an expert yet"
    for of_token in experts:
        yield f"layer {layer}: expert{'s' if len(of_token) > 1 else ''} {', '.join(map(str, of_token))}"


def colour(expert: int, n_experts: int, dark: bool = False) -> tuple[float, float, float]:
    """Lightness, chroma and hue (degrees) in OKLCH.

    The hues are on three rings of different lightness and chroma, and experts with adjacent numbers on different rings.
    """
    ring, place = expert % 3, expert // 3
    per_ring = -(-n_experts // 3)
    hue = 360 * (place + ring / 3) / per_ring
    if dark:
        return (0.29, 0.38, 0.47)[ring], (0.065, 0.09, 0.11)[ring], hue
    return (0.94, 0.85, 0.76)[ring], (0.055, 0.10, 0.13)[ring], hue


def stylesheet(n_experts: int) -> str:
    """The CSS of the page, with a colour for each expert: a background for the best, a line below for the second."""
    rules = [BASE_CSS]
    for scope, expert in product(("", ".dark "), range(n_experts)):
        tone = "oklch({:.3f} {:.3f} {:.1f})".format(*colour(expert, n_experts, dark=scope != ""))
        rules.append(f"{scope}.e{expert} {{ background: {tone} }} {scope}.f{expert} {{ --second: {tone} }}")
    return "\n".join(rules)


BASE_CSS = """
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


def build_page(model: "Transformer", tokenizer: "Tokenizer", name: str) -> "gradio.Blocks":
    """The page: prompt, story, layer and controls of the sampling. Each visitor has a separate `Story`."""
    import gradio as gr

    # `no_grad` holds for one thread, and gradio may run each step of a story on another thread.
    model.requires_grad_(False).eval()
    recorder, config = RoutingRecorder(model), model.config
    first_layer = recorder.layers[0] if recorder.layers else None
    show = partial(story_html, tokenizer=tokenizer, n_experts=config.n_experts)

    def start(story: Story, prompt: str, *values: Any) -> Iterator[str]:
        settings = {key: kind(value or 0) for (key, kind), value in zip(SAMPLING_TYPES.items(), values, strict=True)}
        try:
            for _ in write_story(story, model, tokenizer, recorder, prompt, Sampling(**settings)):
                yield show(story)
        except UserError as error:
            story.status = str(error).removeprefix("--")
            yield show(story)

    def stop(story: Story) -> None:
        story.stop_requested = True

    def recolour(story: Story, layer: int) -> str:
        story.shown_layer = layer
        return show(story)

    experts = f"{config.n_experts} experts, {config.top_k} for each token" if recorder.layers else "no experts"
    heading = f"<b>{escape(name)}</b>{config.n_layers} layers, {experts}"
    default = Sampling()
    with gr.Blocks(title=name, analytics_enabled=False, fill_width=True) as blocks:
        story = gr.State(Story(first_layer))
        gr.HTML(heading, elem_id="head", js_on_load=None)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                prompt = gr.Textbox("Once upon a time", label="Prompt", lines=2, max_lines=8, elem_id="prompt")
                with gr.Row():
                    write_button = gr.Button("Write", variant="primary", elem_id="write", min_width=80)
                    stop_button = gr.Button("Stop", elem_id="stop", min_width=80)
                choice = gr.Radio if len(recorder.layers) <= 12 else gr.Dropdown
                has_layers = first_layer is not None
                layer = choice(recorder.layers, value=first_layer, label="Colours of layer", visible=has_layers)
                shown = gr.HTML(show(Story(first_layer)), js_on_load=None)
            with gr.Column(scale=1, min_width=250):
                most = min(MAX_NEW_TOKENS, config.max_seq_len)
                slider = partial(gr.Slider, buttons=[])
                controls = [  # in the order of SAMPLING_TYPES
                    slider(1, most, min(default.max_new_tokens, most), step=1, label="New tokens"),
                    slider(0, 2, default.temperature, step=0.05, label="Temperature", info="0 is greedy"),
                    slider(0, 200, default.top_k, step=1, label="Top-k", info="0 keeps all tokens"),
                    slider(0.05, 1, default.top_p, step=0.05, label="Top-p"),
                    slider(1, 2, default.repetition_penalty, step=0.05, label="Repetition penalty"),
                    gr.Number(default.seed, label="Seed", precision=0, minimum=0, maximum=2**53),
                ]
        quiet: Any = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        gr.on([write_button.click, prompt.submit], start, [story, prompt, *controls], shown, **quiet)
        stop_button.click(stop, story, None, **quiet)
        layer.input(recolour, [story, layer], shown, **quiet)
    return blocks


def listen(host: str, port: int | None) -> socket.socket:
    """A listening socket at host and port, or at the first of PORTS that is free. Raises UserError."""
    for candidate in PORTS if port is None else [port]:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, candidate), family=family)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                hint = "use 127.0.0.1, the default, to serve this machine only"
                raise UserError(f"--host {host}: cannot listen at this address ({error.strerror}); {hint}") from None
            why = os.strerror(error.errno).lower()
    if port is None:
        raise UserError(f"none of the ports {PORTS[0]} to {PORTS[-1]} is free at {host}; give another one by --port")
    hint = f"give another one, or omit --port to use the first free one from {PORTS[0]}"
    raise UserError(f"--port {port}: {why} at {host}; {hint}")


def serve(blocks: "gradio.Blocks", n_experts: int, listener: socket.socket) -> None:
    """Serve the page until Ctrl-C.

    This does not use `Blocks.launch`, which checks by an HTTP request, possibly through a proxy, that the page answers.
    """
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    host, port = listener.getsockname()[:2]
    # fonts of the visitor's system, so that the page loads none
    font, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        "/",
        host,
        port,
        show_error=False,
        theme=gr.themes.Default(primary_hue="slate", neutral_hue="slate", font=font, font_mono=mono),
        css=stylesheet(n_experts),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        max_file_size=0,
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    if server.started:
        url_host = f"[{host}]" if ":" in host else host
        print(f"http://{url_host}:{port}", flush=True)
    if not ipaddress.ip_address(host).is_loopback:
        print(f"--host {host}: everyone who can reach this address can use the page", file=sys.stderr)
    thread.join()


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m trainer.play", description="A page that shows which expert processes each token.")
    add_checkpoint(parser)
    about = "the address to listen at (default: %(default)s, for this machine only)"
    parser.add_argument("--host", default="127.0.0.1", help=about)
    about = f"the port to listen at; 0: any free one (default: the first free one from {PORTS[0]})"
    parser.add_argument("--port", type=int, help=about)
    add_device(parser)
    args = parser.parse_args(argv)
    if args.port is not None and not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port}: should be from 1 to 65535, or 0 for any free port")
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("the page needs gradio, which is not installed: pip install -e '.[play]'") from None

    from trainer.checkpoint.load import load_model  # here, so that --help does not wait for torch

    with listen(args.host, args.port) as listener:
        model, tokenizer, _ = load_model(args.checkpoint, args.device)
        try:
            blocks = build_page(model, tokenizer, args.checkpoint.resolve().name)
            serve(blocks, model.config.n_experts, listener)
        except KeyboardInterrupt:  # the normal end
            print("the page is closed", file=sys.stderr)
            return 0
    return 1


if __name__ == "__main__":
    exit_now(guarded(main))
