"""Mixture of experts. Four registries, name -> class or "module:Class"; adding a component is one file and one line in its dictionary.

ROUTERS      Router(model, moe, init);         forward(x_TD) -> Routing
EXPERTS      Experts(model, moe, init);        forward(x_RD, rows_E) -> (y_RD, LoreRouting or None)
DISPATCHERS  Dispatcher(moe);                  run(x_TD, routing, experts) -> Computed: y_TD, rows_E, LoreRouting or None
LOSSES       loss(routing, context) -> scalar tensor
"""

from megatron.config.components import DISPATCHERS, EXPERTS, LOSSES, ROUTERS
from megatron.model.moe.layer import MoELayer, MoEOutput
from megatron.model.moe.routing import LoreRouting, LossContext, Routing

__all__ = ["DISPATCHERS", "EXPERTS", "LOSSES", "ROUTERS", "LoreRouting", "LossContext", "MoELayer", "MoEOutput", "Routing"]
