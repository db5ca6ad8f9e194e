"""What rules for low-rank pairs have in common."""

from fedsim.errors import InputError
from fedsim.methods import Method
from fedsim.methods.lora import Lora
from fedsim.params import Params
from fedsim.registry import name_of
from fedsim.servers import Server


def wants_lora(rule: Server, method: Method) -> None:
    if not isinstance(method, Lora):
        raise InputError(f"server {name_of(rule)} wants the low-rank pairs of method lora, not {name_of(method)}")


def products(params: Params) -> Params:
    """up @ down of every pair, in float64, by the name of the matrix that it is added to."""
    return {
        name.replace("up.", "merged.", 1): up.double() @ params[name.replace("up.", "down.", 1)].double()
        for name, up in params.items()
        if name.startswith("up.")
    }
