"""The mean in which a client weighs as much as its classes are like the new ones (Fed-MP).

Source: Zeng et al., NAACL 2024, arXiv 2404.01232; as in the authors' code, huiminzeng/Fed-MP, commit 92c9d66, train.py.

Differs: a likeness below 1e-6 counts as 1e-6, so that clients weigh the same if none is like the new classes; in the
code a negative one reverses a client's update.
"""

from fedsim.errors import InputError
from fedsim.methods.fedmp import FedMP
from fedsim.registry import component, name_of
from fedsim.servers import Reply, Server
from fedsim.servers._needs import required
from fedsim.updates import apply_update, mean_delta


@component
class Likeness(Server):
    """For method `fedmp`, whose clients compute their likeness.

    It is the sum of the cosines of a new class's text with the client's class texts, to which residuals are added,
    averaged over the new classes. Without new classes (`--new-classes`) all clients weigh the same.

    The likeness is one number more than the gate in both directions.
    """

    def adapt(self, method):
        method = required(self, method, FedMP, "residuals of method fedmp")
        if method.label_space == "client":
            raise InputError(
                f"server {name_of(self)} takes classes that do not compete for new ones; "
                "set --method.label-space all, not client"
            )
        return method

    def reply(self, update):
        likeness = update.trained.get("likeness")
        return Reply(1.0 if likeness is None else max(likeness.item(), 1e-6))

    def step(self, params, slots, total, rng):
        return apply_update(params, mean_delta(total, params)), slots
