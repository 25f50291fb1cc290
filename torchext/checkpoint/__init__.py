"""FP8 checkpoints on disk: what they are, whether they are sound, and one format from another.

- `inspect(path)` says what a checkpoint is, `verify(path)` checks scales against weights.
- `quantize`, `dequantize` and `convert` write a new folder, tensor by tensor, without a model.
- `quantize_state_dict(named_tensors)` gives the same bits for tensors in memory.
- `python -m torchext.checkpoint inspect|convert|verify PATH` does the same from a shell.

Needs safetensors: `pip install torchext-fp8[checkpoint]`. docs/checkpoints.md lists the formats.
"""

from .conversion import Conversion, convert, dequantize, quantize
from .files import CheckpointError
from .inspection import Inspection, inspect
from .state_dict import quantize_state_dict
from .verification import Verification, WeightError, verify

__all__ = [
    "CheckpointError",
    "Conversion",
    "Inspection",
    "Verification",
    "WeightError",
    "convert",
    "dequantize",
    "inspect",
    "quantize",
    "quantize_state_dict",
    "verify",
]
