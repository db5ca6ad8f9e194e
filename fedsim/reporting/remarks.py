"""What a reader must know before the numbers of a run: how its round was chosen, and what they lack."""

import numpy as np

from fedsim.errors import counted, listing
from fedsim.formats import difference, number, percent
from fedsim.reporting.accuracies import rows_tested
from fedsim.reporting.tables import ZERO_SHOT, Tables

NEVER = "The round is never chosen on test rows; curves of test rows are shown for inspection only."

SCRAMBLED = (
    "Scrambled labels: the rows of clients have the images of other rows, in training and in tests, as in published "
    "label-shift tables (--partition.scramble-labels), so accuracy on clients' own rows does not measure recognition; "
    "what can be learned is which classes a client has."
)


def remarks(tables: Tables) -> list[str]:
    """Sentences on how the round was chosen, and on what was not trained or evaluated."""
    chosen, last, means = tables.chosen_round, tables.last_round, tables.summary()
    if last == 0:
        sentences = ["No round was run: the numbers are those of the parameters that training would start from."]
    elif np.isnan(means["validation"]):
        sentences = [f"Round {chosen} is reported because it is the last: no client has validation rows."]
    else:
        sentences = [f"Round {chosen} of {last} is reported: the first with the highest mean validation accuracy."]
    if len(tables.by_task):
        sentences.append(_tasks(tables, means))
    if last and tables.facts.get("trained_parameters") and not tables.rounds.steps.sum():
        sentences.insert(0, "No client took a local step in any round: the numbers are those of untrained parameters.")
    if tables.facts.get("groups"):
        sentences.append(_groups(tables.facts["groups"], means))
    if tables.tuned:
        sentences.append(_tuned(tables))
    if tables.facts.get("transductive"):
        sentences.append(
            f"Transductive: training reads the test rows of held-out {listing(tables.held_out)} without their labels, "
            "so held-out accuracy does not compare with that of methods that never see these rows."
        )
    if malicious := tables.facts.get("malicious"):
        clients = "client is" if len(malicious) == 1 else "clients are"
        sentences.append(
            f"Attack {tables.experiment['attack']['name']}: {len(malicious)} {clients} malicious; accuracies and "
            "losses are those of the others."
        )
    if tables.facts.get("scrambled"):
        sentences.append(SCRAMBLED)
    if about := tables.facts.get("privacy"):
        sentences.append(_privacy(tables, about))
    if evaluated := tables.facts.get("evaluated"):
        sentences.append(f"Evaluated parameters: {evaluated}; clients are sent others.")
    if np.isnan(means["personalization"]):
        sentences.append("No client has test rows of its own.")
    elif tables.facts.get("unseen_test"):
        sentences.append(
            "Test rows show concepts that no training or validation row shows, in any domain, so test accuracy is "
            "expected to be lower than validation accuracy."
        )
    return sentences + [f"No client trains on a class of held-out domain {name}." for name in _foreign(tables)]


def _privacy(tables: Tables, about: str) -> str:
    epsilon = tables.rounds.epsilon.max() if len(tables.rounds) else 0.0
    return (
        f"Privacy: epsilon {number(epsilon)} after {counted(len(tables.rounds), 'round')} ({about}). It is that of a "
        "deployment with secret random numbers, and about the shared parameters of all rounds; the accuracies here, "
        "and the choice of a round by them, are not private."
    )


def _tasks(tables: Tables, means: dict[str, float]) -> str:
    return (
        f"Classes arrive in {tables.experiment['tasks']} tasks. A round is evaluated on the classes so far, and the "
        "reported one is chosen among those of the last task. On own test rows of all clients together, accuracy is "
        f"{percent(means['average_accuracy'])}% on average over the ends of the tasks and "
        f"{percent(means['last_accuracy'])}% at the end of the last; forgetting is "
        f"{percent(means['forgetting'])} points."
    )


def _groups(groups: list[str], means: dict[str, float]) -> str:
    worst, parity, odds = (percent(means[key]) for key in ("worst_group", "demographic_parity", "equalized_odds"))
    return (
        f"On own test rows in {len(groups)} groups ({listing(groups)}), accuracy is {worst}% in the worst; demographic "
        f"parity difference {parity} points, equalized odds difference {odds} points."
    )


def _tuned(tables: Tables) -> str:
    epochs, last = tables.experiment["tune_epochs"], tables.last_round
    unlike = "" if tables.chosen_round == last else f", not round {tables.chosen_round}"
    return (
        f"Tuned models: after the last round ({last}{unlike}), each client has trained its model for "
        f"{counted(epochs, 'more local epoch')} on its own train rows."
    )


def remarks_of_page(tables: Tables) -> str:
    """`remarks`, and what the tables and plots of a page need to be understood."""
    text = " ".join([*remarks(tables), *[NEVER] * bool(tables.last_round)])
    scores, new = tables.trained.scores, tables.new_classes
    models = scores[scores.domain.isin(tables.held_out) | (scores.split == "new")].client.nunique()
    if models > len(tables.held_out) + bool(new):
        accuracy = "accuracy on held-out domains and new classes" if new else "held-out accuracy"
        text += f" Each of {models} clients has its own model: {accuracy} is the mean over their models."
    if new:
        text += (
            f" No client trains on the {len(new)} new classes, the last by label"
            f"{' of each data set' if tables.class_domain else ''}; rows of these classes "
            "in held-out domains are not evaluated."
        )
    if skipped := tables.facts.get("skipped"):
        text += f" Unreadable images that were left out: {len(skipped)}, listed at the end."
    return text


def comparison(tables: Tables) -> str:
    """A sentence that says what is compared with zero-shot CLIP, and on which rows; empty if there are none."""
    tested, scores = rows_tested(tables), tables.zero_shot.scores
    own = scores[(scores.split == "test") & ~scores.domain.isin(tables.held_out)]
    clients = own.client.nunique()
    rows = {
        f"of held-out {listing(tables.held_out)}": tested["generalization"],
        f"of {counted(clients, 'client')}": tested["personalization"],
        "of new classes": int(scores.total[scores.split == "new"].sum()),
    }
    counts = [
        f"{number(count)} test {'row' if count == 1 else 'rows'} {whose}" for whose, count in rows.items() if count
    ]
    name = f"{tables.experiment['method']['name']} with {tables.experiment['server']['name']}"
    comparison = f"{name} in round {tables.chosen_round} is compared with zero-shot CLIP on {' and on '.join(counts)}."
    return comparison if counts else ""


def message(tables: Tables) -> str:
    """What a reader looks for first: what is compared, the gain, and its cost."""
    before, after = tables.summary(ZERO_SHOT), tables.summary()
    gains = [
        f"{difference(before[key], after[key])} points on {rows} ({percent(before[key])}% to {percent(after[key])}%)"
        for key, rows in (("generalization", "held-out domains"), ("personalization", "own test rows"))
        if not np.isnan(after[key])
    ]
    costs = tables.rounds
    megabytes = number((costs.bytes_up + costs.bytes_down).sum() / 1e6)
    cost = f"Cost: {megabytes} megabytes up and down and {number(costs.seconds.sum())} seconds of training"
    cost += f" in {counted(tables.last_round, 'round')}, all clients together."
    sentences = [comparison(tables), f"Difference: {' and '.join(gains)}." if gains else "", cost]
    return " ".join(filter(None, sentences))


def _foreign(tables: Tables) -> list[str]:
    """Held-out domains without a class that a client trains on; none if only some clients' rows are known."""
    partition = tables.partition
    trained = set(partition.label[partition.split == "train"])
    known = [] if tables.experiment.get("eval_clients") else tables.held_out
    test = partition[partition.split == "test"]
    return [name for name in known if trained.isdisjoint(test.label[test.domain == name])]
