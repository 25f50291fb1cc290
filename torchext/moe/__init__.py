"""Tokens to the ranks that hold their experts, in FP8, and the experts' results back.

    dispatcher = torchext.moe.Dispatcher(num_experts, group=group)
    routing = dispatcher.create_routing(ids, weights)
    rows = dispatcher.dispatch(x, routing)          # FP8 rows, sorted by expert
    y = experts(rows)                               # one row for each
    out = dispatcher.combine(y, routing)            # the sum of each token's rows

`torchext.nn.MoE(dispatcher=...)` puts an autograd function around it, and `experts` below is that
function for weights of your own. `overlap_forward_backward` runs one micro-batch's forward beside
another's backward, so that tokens of one travel while experts of the other multiply;
`overlap_in_schedule` makes torch's pipelines do so.
"""

from .dispatcher import Dispatcher
from .function import experts
from .overlap import overlap_forward_backward
from .routing import Routing, Rows
from .schedule import overlap_in_schedule
from .transport import MissingRanksError
from .work import Work

__all__ = [
    "Dispatcher",
    "MissingRanksError",
    "Routing",
    "Rows",
    "Work",
    "experts",
    "overlap_forward_backward",
    "overlap_in_schedule",
]
