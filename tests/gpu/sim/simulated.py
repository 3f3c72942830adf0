"""One process of a run on simulated GPUs: `trainer.main`, with replacements for code that needs a device's results.

    python -m tests.gpu.sim.simulated --config launch/tiny.yaml ...     with the libraries of build.py preloaded

Every value that is read back from the device is zero. Most of the trainer works with zeros. The code that does not is
replaced here and nowhere else, so this is the file to adapt if a change of the trainer breaks only the simulation.

Environment: SIM_SKEW=1 sends all rows of the exchange to the last rank. SIM_INIT=0 skips the initial weights, which a
CPU needs minutes to draw for a large model. SIM_VOCAB replaces the size of the corpus's vocabulary. SIM_RECORD=FILE
records the run, see record.py.
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

SEGMENT = 64  # tokens of each segment that is given to `SegmentGroups`


def prepare() -> None:
    _disable_cudnn_attention()
    _replace_sizes_of_exchange()
    _replace_segments_of_attention()
    _stage_one_rank_at_a_time()
    if os.environ.get("SIM_INIT") == "0":
        Transformer.init_weights = lambda self, seed, local=None: None  # type: ignore[method-assign]
    if vocabulary := os.environ.get("SIM_VOCAB"):
        size = property(lambda self: int(vocabulary), lambda self, value: None)
        data.tokenizer.Tokenizer.vocab_size = size  # type: ignore[assignment]
    if path := os.environ.get("SIM_RECORD"):
        from tests.gpu.sim.record import Recorder

        Recorder(Path(path)).install()


def _disable_cudnn_attention() -> None:
    """cuDNN makes the plans of its attention on a device. Without it SDPA uses flash attention on an H100."""
    torch_c: Any = torch._C
    set_cudnn = torch_c._set_sdp_use_cudnn
    torch_c._set_sdp_use_cudnn = lambda enabled: set_cudnn(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def _replace_sizes_of_exchange() -> None:
    """Each rank sends the same number of rows to each rank, or with SIM_SKEW all rows to the last rank."""
    kind: Any = parallel.experts.AllToAllExchange
    dispatch, read_splits = kind.dispatch, kind.read_splits

    def remember_rows(self: Any, rows: Any, *rest: Any) -> Any:
        self.simulated_rows = len(rows)
        return dispatch(self, rows, *rest)

    def replaced(self: Any, *counts: Any) -> Any:
        asked = read_splits(self, *counts)  # it waits for the device, as in a real run
        ranks, slots = self.placement.ranks, self.placement.slots
        if os.environ.get("SIM_SKEW"):
            last = self.mesh.get_local_rank("expert") == ranks - 1
            send, receive = [0] * (ranks - 1) + [self.simulated_rows], [self.simulated_rows if last else 0] * ranks
        else:
            send = receive = [self.simulated_rows // ranks] * ranks
        slot = [sum(receive) // slots + (i < sum(receive) % slots) for i in range(slots)]
        return (send, receive, slot)[: len(asked)]

    kind.dispatch, kind.read_splits = remember_rows, replaced


def _replace_segments_of_attention() -> None:
    """The CPU groups segments by their starts, which it reads from the device. Here each has SEGMENT tokens."""
    kind: Any = model.segments.SegmentGroups
    init = kind.__init__

    def replaced(self: Any, starts: torch.Tensor, device: torch.device) -> None:
        if starts.device.type == "cuda":
            starts.flatten().nonzero()[:, 0].cpu()  # it waits for the device, as in a real run
            starts = torch.arange(starts.numel()).view(starts.shape) % SEGMENT == 0
        init(self, starts, device)

    kind.__init__ = replaced


def _stage_one_rank_at_a_time() -> None:
    """Fill staging memory with zeros on one rank at a time, which limits the memory that ranks use at the same time.

    The simulated cudaHostRegister frees the pages of zeros again.
    """
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
