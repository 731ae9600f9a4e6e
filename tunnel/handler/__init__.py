"""The seam: what is handled (visits), what handles it (handlers), and what is wrapped around it (layers).

A *visit* is one thing being handled. The room that handles it makes the visit and fills in the facts; layers around
the handler (metrics, tracing, logs, third parties) see it begin, run and end. Parents are explicit, so no context
variable has to cross a task or the link. With no layer a handler is the bare function and nothing is paid.

All of it is imported from here; the rooms are visits, layers (with the guard), statistics, and host (what a plug-in is
given).
"""

from tunnel.handler.host import (
    AgentReport,
    Check,
    Host,
    Offered,
    Page,
    PageAnswer,
    PageRequest,
    PlugIn,
    Tasks,
    Workers,
    no_such_page,
)
from tunnel.handler.layers import (
    Begin,
    End,
    Ended,
    Enter,
    Guard,
    Handler,
    Layer,
    Leave,
    Observer,
    wrap,
)
from tunnel.handler.statistics import (
    AgentStatistics,
    CoreStatistics,
    LinkStatistics,
    QuotaStatistics,
)
from tunnel.handler.visits import (
    ConnectVisit,
    Fields,
    LinkVisit,
    LocalVisit,
    QueryVisit,
    RequestVisit,
    StreamVisit,
    Visit,
    monotonic,
    path_of,
)

__all__ = [
    "AgentReport",
    "AgentStatistics",
    "Begin",
    "Check",
    "ConnectVisit",
    "CoreStatistics",
    "End",
    "Ended",
    "Enter",
    "Fields",
    "Guard",
    "Handler",
    "Host",
    "Layer",
    "Leave",
    "LinkStatistics",
    "LinkVisit",
    "LocalVisit",
    "Observer",
    "Offered",
    "Page",
    "PageAnswer",
    "PageRequest",
    "PlugIn",
    "QueryVisit",
    "QuotaStatistics",
    "RequestVisit",
    "StreamVisit",
    "Tasks",
    "Visit",
    "Workers",
    "monotonic",
    "no_such_page",
    "path_of",
    "wrap",
]
