"""Tokens to the ranks that hold their experts, in FP8, and the experts' results back.

    dispatcher = torchext.moe.Dispatcher(num_experts, group=group)
    routing = dispatcher.create_routing(ids, weights)
    rows = dispatcher.dispatch(x, routing)          # FP8 rows, sorted by expert
    y = experts(rows)                               # one row for each
    out = dispatcher.combine(y, routing)            # the sum of each token's rows

`torchext.nn.MoE(dispatcher=...)` puts an autograd function around it, and `experts` below is that
function for weights of your own.
"""

from .dispatcher import Dispatcher
from .function import experts
from .routing import Routing, Rows
from .transport import MissingRanksError
from .work import Work

__all__ = ["Dispatcher", "MissingRanksError", "Routing", "Rows", "Work", "experts"]
