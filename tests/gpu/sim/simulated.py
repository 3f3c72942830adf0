"""One process of a run on simulated GPUs: `trainer.main`, with what would break without results from a device replaced.

    python -m tests.gpu.sim.simulated --config launch/tiny.yaml ...     with the libraries of build.py preloaded

Whatever is read back from the device is zero. Most of the trainer works with that. What does not is replaced here and
nowhere else, so this is the file to adapt if a change of the trainer breaks only the simulation.

Environment: SIM_SKEW=1 sends all rows of the exchange to the last rank. SIM_INIT=0 skips drawing the initial weights,
which takes minutes for a large model. SIM_VOCAB gives the model another vocabulary than the corpus has. SIM_RECORD=FILE
makes the run a recording, see record.py.
"""

import fcntl
import os
from pathlib import Path
from typing import Any

import torch

import data.tokenizer
import model.segments
import parallel.experts
import trainer.checkpoint.layout
import trainer.main
from model.transformer import Transformer
from trainer.cli import guarded
from trainer.fault_tolerance.launcher import exit_now

SEGMENT = 64  # tokens of the segments that `SegmentGroups` gets


def prepare() -> None:
    _leave_out_cudnn_attention()
    _give_sizes_to_the_exchange()
    _give_segments_to_groups()
    _stage_one_rank_at_a_time()
    if os.environ.get("SIM_INIT") == "0":
        Transformer.init_weights = lambda self, seed, local=None: None  # type: ignore[method-assign]
    if vocabulary := os.environ.get("SIM_VOCAB"):
        size = property(lambda self: int(vocabulary), lambda self, value: None)
        data.tokenizer.Tokenizer.vocab_size = size  # type: ignore[assignment]
    if path := os.environ.get("SIM_RECORD"):
        from tests.gpu.sim.record import Recorder

        Recorder(Path(path)).install()


def _leave_out_cudnn_attention() -> None:
    """cuDNN plans its attention on a device. SDPA takes its next choice, which on an H100 is flash attention."""
    switches: Any = torch._C
    switch = switches._set_sdp_use_cudnn
    switches._set_sdp_use_cudnn = lambda enabled: switch(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def _give_sizes_to_the_exchange() -> None:
    """Every rank sends the same number of rows to each, or with SIM_SKEW all to the last one."""
    kind: Any = parallel.experts.AllToAllExchange
    dispatch, read_splits = kind.dispatch, kind.read_splits

    def remember_rows(self: Any, rows: Any, *rest: Any) -> Any:
        self.simulated_rows = len(rows)
        return dispatch(self, rows, *rest)

    def replaced(self: Any, *counts: Any) -> Any:
        asked = read_splits(self, *counts)  # it waits for the device as it would
        ranks, slots = self.placement.ranks, self.placement.slots
        if os.environ.get("SIM_SKEW"):
            last = self.mesh.get_local_rank("expert") == ranks - 1
            send, receive = [0] * (ranks - 1) + [self.simulated_rows], [self.simulated_rows if last else 0] * ranks
        else:
            send = receive = [self.simulated_rows // ranks] * ranks
        slot = [sum(receive) // slots + (i < sum(receive) % slots) for i in range(slots)]
        return (send, receive, slot)[: len(asked)]

    kind.dispatch, kind.read_splits = remember_rows, replaced


def _give_segments_to_groups() -> None:
    """Groups of segments are laid out by the CPU, from starts that it reads from the device."""
    kind: Any = model.segments.SegmentGroups
    init = kind.__init__

    def replaced(self: Any, starts: torch.Tensor, device: torch.device) -> None:
        if starts.device.type == "cuda":
            starts.flatten().nonzero()[:, 0].cpu()  # as it would
            starts = torch.arange(starts.numel()).view(starts.shape) % SEGMENT == 0
        init(self, starts, device)

    kind.__init__ = replaced


def _stage_one_rank_at_a_time() -> None:
    """The staging memory of a save is filled with zeros, and given back when it is locked: see cudaHostRegister."""
    kind: Any = trainer.checkpoint.layout.StagingBuffer
    folder = os.environ.get("SIM_GPU_FOLDER")
    init = kind.__init__

    def replaced(self: Any, source: Any) -> None:
        with open(f"{folder}/staging.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            init(self, source)

    if folder:
        kind.__init__ = replaced


if __name__ == "__main__":
    prepare()
    exit_now(guarded(trainer.main.main))
