"""Low-rank pairs in CLIP's towers, and the server rules that combine them."""

import numpy as np
import pytest
import torch
from shown import write_drawings
from test_finetune import CLASSES, Y, embedded, inputs, other, whole, zero_shot

from fedsim import Config, InputError, run
from fedsim.methods import Batch, trained
from fedsim.methods.lora import Lora
from fedsim.params import flatten
from fedsim.registry import component, parse
from fedsim.rng import torch_rng
from fedsim.servers import ClientUpdate
from fedsim.training.round_zero import initial_params
from fedsim.training.stack import gradients
from fedsim.training.task import Task
from fedsim.updates import CLIENT_STATS, RoundSum, sum_chunks

RULES = "ffa_lora", "fedsa_lora", "fedex_lora", "lora_stacking"
NOISE = 0.05


def lora(**fields):
    return parse("method", {"name": "lora", **fields})


@pytest.fixture(scope="module")
def tiny():
    return whole(*embedded())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


def shaken(module, seed=0):
    """The module's tensors, all of them away from zero."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (tensor + NOISE * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)).detach()
        for name, tensor in module.state_dict().items()
    }


# The method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"modules": "mlp"}, {"towers": "both", "modules": "all"}])
def test_it_starts_as_zero_shot_clip_whatever_down_is(fields, tiny):
    backbone, pixels, features = tiny
    method = lora(**fields)
    module = method.build(backbone).double()
    x = inputs(method, pixels, features)
    torch.testing.assert_close(module(x), zero_shot(backbone, features), rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(method.loss(module, Batch(x, Y)), list(module.parameters()))
    slopes = dict(zip(trained(module), grads, strict=True))
    assert all((grad.abs().max() > 0) == name.startswith("up.") for name, grad in slopes.items())


def test_text_attention_of_rank_two_has_two_times_two_sides_for_each_of_q_k_v_and_out(tiny):
    module = lora().build(tiny[0])
    assert sum(p.numel() for p in module.parameters()) == 4 * 4 * 2 * (128 + 128)  # 4 blocks, 4 matrices, rank 2
    place = "text/transformer/resblocks/0/attn"
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if f"{place}/" in name}
    assert shapes == {
        f"down.{place}/in_proj_weight": (3, 2, 128),
        f"up.{place}/in_proj_weight": (3, 128, 2),
        f"down.{place}/out_proj/weight": (2, 128),
        f"up.{place}/out_proj/weight": (128, 2),
    }


def test_pairs_start_with_the_variance_of_their_rank(tiny):
    downs = [p for name, p in lora(rank=4, modules="mlp").build(tiny[0]).named_parameters() if name.startswith("down")]
    assert torch.cat([p.flatten() for p in downs]).var().item() == pytest.approx(1 / 4, rel=0.1)


@pytest.mark.parametrize("fields", [{}, {"towers": "image", "modules": "all", "alpha": 3.0, "rank": 3}])
def test_logits_are_those_of_a_clip_whose_matrices_have_the_product_added(fields, tiny):
    """Against the tower with the changed weights written into it by hand."""
    backbone, pixels, features = tiny
    method = lora(**fields)
    module = parse("server", "fedex_lora").adapt(method).build(backbone).double()
    module.load_state_dict(shaken(module))
    side = {"text": backbone.text, "image": backbone.image}[method.towers]
    parts = module.state_dict()
    changed = {}
    for name in (n.removeprefix("up.") for n in parts if n.startswith("up.")):
        place = name.removeprefix(f"{method.towers}/").replace("/", ".")
        weight = side.weights[place]
        if place.endswith("in_proj_weight"):
            blocks = [parts[f"up.{name}"][k] @ parts[f"down.{name}"][k] + parts[f"merged.{name}"][k] for k in range(3)]
            product = torch.cat(blocks)
        else:
            product = parts[f"up.{name}"] @ parts[f"down.{name}"] + parts[f"merged.{name}"]
        changed[place] = weight + method.alpha / method.rank * product.reshape(weight.shape)
    image, texts = features, backbone.class_embeddings
    if method.towers == "image":
        image = backbone.image.encode(pixels, changed)
    else:
        tokens = backbone.text.tokenize([f"a picture of a {name}" for name in CLASSES])
        texts = backbone.text.encode(tokens, backbone.text.ends(tokens), changed)
    cosines = torch.cosine_similarity(image.unsqueeze(1), texts.unsqueeze(0), dim=2)
    logits = module(inputs(method, pixels, features))
    torch.testing.assert_close(logits, backbone.logit_scale * cosines, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits, zero_shot(backbone, features), atol=0.1)


def test_matrices_are_chosen_by_kind_in_resnets_and_vision_transformers(folder):
    def places(kind, modules):
        backbone, *_ = whole(*other(kind, folder))
        names = lora(towers="image", modules=modules).build(backbone).state_dict()
        return {name.removeprefix("up.image/") for name in names if name.startswith("up.")}

    assert places("resnet", "attention") == {f"attnpool/{x}_proj/weight" for x in "qkvc"}
    blocks = "transformer/resblocks/0", "transformer/resblocks/1"
    attention = {f"{block}/attn/{x}" for block in blocks for x in ("in_proj_weight", "out_proj/weight")}
    mlp = {f"{block}/mlp/{x}/weight" for block in blocks for x in ("c_fc", "c_proj")}
    assert places("vit", "attention") == attention
    assert places("vit", "mlp") == mlp
    assert places("vit", "all") == attention | mlp | {"conv1/weight", "proj"}
    convolutions = {name for name in places("resnet", "all") if "conv" in name}
    assert {"conv1/weight", "layer1/0/conv2/weight"} < convolutions
    assert not {name for name in places("resnet", "all") if "embedding" in name}


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_other_image_towers_start_as_zero_shot_clip_and_learn(kind, folder):
    backbone, pixels, features = whole(*other(kind, folder))
    method = lora(towers="image")
    module = method.build(backbone).double()
    torch.testing.assert_close(module(pixels), zero_shot(backbone, features), rtol=1e-5, atol=1e-5)
    params = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    _, grads = gradients(method, module, params, Batch(pixels.unsqueeze(0), Y.unsqueeze(0)))
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if name.startswith("up."))


def test_a_tower_without_such_matrices_says_what_it_has(tiny, folder):
    with pytest.raises(InputError, match=r"attention matrices in the image tower, which has none; .* trunk\.conv_stem"):
        lora(towers="both").build(tiny[0])
    with pytest.raises(InputError, match="mlp matrices in the image tower"):
        lora(towers="image", modules="mlp").build(whole(*other("resnet", folder))[0])


def test_a_rank_without_room_names_the_matrix(tiny):
    with pytest.raises(InputError, match=r"rank 129 .*resblocks\.0\.attn\.in_proj_weight, 128 x 128; .* is 128$"):
        lora(rank=129).build(tiny[0])
    with pytest.raises(InputError, match=r"rank 10 .*trunk\.blocks\.0\.0\.conv_dw\.weight, 32 x 9; .* is 9$"):
        lora(rank=10, towers="image", modules="all").build(tiny[0])


# The rules -------------------------------------------------------------------------------------------------------


class Federation:
    """Clients that take steps of plain gradient descent, each on classes of its own, and a rule that combines them."""

    def __init__(self, rule, backbone, features, clients, weights=None):
        self.server = parse("server", rule)
        self.method = self.server.adapt(lora(rank=3, alpha=6.0))
        torch.manual_seed(3)
        self.module = self.method.build(backbone).double()
        self.features, self.ys = features, [torch.tensor([k % 4, (k + 1) % 4, 2, 3]) for k in range(clients)]
        self.weights = weights or [1.0] * clients
        state = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        self.scopes = {name: self.server.scope(name, self.method.scope(name)) for name in state}
        self.params, self.slots, self.clients, self.rounds = state, {}, [], 0

    def select(self, params, *scopes):
        return {name: tensor for name, tensor in params.items() if self.scopes[name] in scopes}

    def round(self, steps=3, lr=0.1):
        shared, partials = self.select(self.params, "shared"), []
        mine = [self.select(client, "private") for client in self.clients] or [{}] * len(self.ys)
        self.clients, self.rounds = [], self.rounds + 1
        for k, y in enumerate(self.ys):
            ours = self.params | self.server.start(shared, torch_rng(0, "start", self.rounds, k)) | mine[k]
            learned = [name for name in trained(self.module) if self.scopes[name] in ("shared", "private")]
            for _ in range(steps):
                given = {name: tensor.unsqueeze(0) for name, tensor in ours.items()}
                _, grads = gradients(self.method, self.module, given, Batch(self.features.unsqueeze(0), y.unsqueeze(0)))
                ours = ours | {name: ours[name] - lr * grads[name][0] for name in learned}
            self.clients.append(ours)
            update = ClientUpdate(shared, self.select(ours, "shared"), {}, {}, 1, steps, 0, self.method, self.method.lr)
            message = self.server.reply(update).message
            delta = flatten({name: ours[name] - tensor for name, tensor in shared.items()})
            note, weight = np.zeros(1, CLIENT_STATS), self.weights[k]
            partials.append(RoundSum(weight * delta, weight, note, weight * flatten(message).astype(np.float64)))
        given = self.select(self.params, "shared", "server")
        params, self.slots = self.server.step(given, self.slots, sum_chunks(partials), torch.Generator())
        assert params.keys() == given.keys()
        assert all(params[name].dtype == torch.float64 and params[name].shape == given[name].shape for name in given)
        self.params = self.params | params
        return self

    def added(self, params):
        """What is added to every matrix of the tower, in one vector."""
        parts = [
            params[name] @ params[name.replace("up.", "down.")] for name in sorted(params) if name.startswith("up.")
        ]
        merged = [tensor for name, tensor in sorted(params.items()) if name.startswith("merged.")]
        both = [a + b for a, b in zip(parts, merged, strict=True)] if merged else parts
        return 6.0 / 3 * torch.cat([part.flatten() for part in both])

    def mean_added(self):
        shares = np.array(self.weights) / sum(self.weights)
        return sum(share * self.added(client) for share, client in zip(shares, self.clients, strict=True))


def off(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("rule", ["fedavg", "fedex_lora", "lora_stacking"])
def test_with_one_client_the_weights_are_that_clients(rule, tiny):
    ours = Federation(rule, tiny[0], tiny[2], clients=1).round()
    alone = ours.added(ours.clients[0])
    assert alone.norm() > 0.1
    torch.testing.assert_close(ours.added(ours.params), alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weights", [None, [1.0, 5.0, 2.0]])
@pytest.mark.parametrize("rule", ["fedex_lora", "lora_stacking", "ffa_lora"])
def test_the_mean_of_the_clients_weights_is_exact_in_every_round(rule, weights, tiny):
    ours = Federation(rule, tiny[0], tiny[2], clients=3, weights=weights)
    for _ in range(3):
        ours.round(steps=2)
        assert off(ours.added(ours.params), ours.mean_added()) < 1e-12


def test_the_mean_of_the_clients_weights_is_missed_by_fedit(tiny):
    ours = Federation("fedavg", tiny[0], tiny[2], clients=3).round()
    assert off(ours.added(ours.params), ours.mean_added()) > 1e-3


def test_stacking_draws_the_start_of_a_pair_by_the_seed_alone(tiny):
    ours = Federation("lora_stacking", tiny[0], tiny[2], clients=1)
    shared = ours.select(ours.params, "shared")
    reverse = dict(reversed(shared.items()))
    draws = (shared, 1), (reverse, 1), (shared, 2)
    first, again, other = (ours.server.start(params, torch_rng(seed, "start")) for params, seed in draws)
    assert first.keys() == {name for name in shared if name.startswith("down.")}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert torch.cat([tensor.flatten() for tensor in first.values()]).var().item() == pytest.approx(1 / 3, rel=0.1)


def test_stacking_leaves_the_servers_pairs_as_they_were_and_moves_the_products_alone(tiny):
    ours = Federation("lora_stacking", tiny[0], tiny[2], clients=2)
    before = dict(ours.params)
    ours.round()
    changed = {name for name in before if not torch.equal(before[name], ours.params[name])}
    assert changed == {name for name in before if name.startswith("merged.")}
    assert all((ours.params[name] == 0).all() for name in ours.params if name.startswith("up."))
    assert ours.slots == {}


@pytest.fixture(scope="module")
def stacked(folder):
    """Makes a run of lora_stacking: 3 clients, pairs of rank 3, a handful of images each."""
    drawings = write_drawings(folder / "drawings", ("ink",), each=8)

    def make(name, **fields):
        quick = {"dataset": "folder", "data_dir": drawings, "partition": "iid", "clients": 3, "shots": 1}
        quick |= {"actors": 0, "eval_clients": 1, "page": False}
        method = {"name": "lora", "rank": 3, "lr": 3e-3, "batch_size": 8}
        fields = quick | {"rounds": 2, "method": method, "server": "lora_stacking"} | fields
        return run(Config(**fields, out=folder / "stacked" / name)).adapter

    return make


@pytest.fixture(scope="module")
def plain(stacked):
    return stacked("plain", rounds=1)


def test_the_stack_of_three_pairs_of_rank_3_has_rank_9(plain):
    """Pairs that start from one and the same `down` would leave nearly nothing beyond the first 3 directions."""
    stacks = [tensor.double() for name, tensor in plain.items() if name.startswith("merged.")]
    energy = torch.cat([torch.linalg.svdvals(stack).square().reshape(-1, stack.shape[-1]) for stack in stacks])
    shares = energy.sum(dim=0) / energy.sum()
    assert shares[9:].sum() < 1e-9
    assert shares[:3].sum() < 0.9
    assert shares[8] > 1e-3


@pytest.mark.parametrize("fields", [{"engine": "reference"}, {"chunk": 2}, {"chunk": 1}])
def test_a_clients_draw_depends_on_neither_the_chunk_nor_the_path(fields, stacked, plain):
    same = stacked(str(fields), rounds=1, **fields)
    other = stacked("other seed", rounds=1, seed=1)
    for name in (name for name in plain if name.startswith("merged.")):
        assert off(same[name], plain[name]) < 1e-3
        assert off(other[name], plain[name]) > 0.5


def test_fedex_goes_on_from_the_mean_pair(tiny):
    fedex, fedit = (Federation(rule, tiny[0], tiny[2], clients=3).round() for rule in ("fedex_lora", "fedavg"))
    for name in fedit.params:
        torch.testing.assert_close(fedex.params[name], fedit.params[name], rtol=1e-12, atol=1e-14)


def test_who_has_which_half_of_a_pair(tiny):
    scopes = {rule: Federation(rule, tiny[0], tiny[2], clients=1).scopes for rule in (*RULES, "fedavg")}
    halves = {rule: {name.partition(".")[0]: s for name, s in some.items()} for rule, some in scopes.items()}
    assert halves == {
        "fedavg": {"down": "shared", "up": "shared"},
        "ffa_lora": {"down": "frozen", "up": "shared"},
        "fedsa_lora": {"down": "shared", "up": "private"},
        "fedex_lora": {"down": "shared", "up": "shared", "merged": "server"},
        "lora_stacking": {"down": "shared", "up": "shared", "merged": "server"},
    }


def test_ffa_moves_no_down_and_fedsa_moves_no_up(tiny):
    for rule, kept, moves in (("ffa_lora", "down.", "up."), ("fedsa_lora", "up.", "down.")):
        ours = Federation(rule, tiny[0], tiny[2], clients=2)
        before = dict(ours.params)
        # `down` has no gradient while `up` is zero, so it takes a second step.
        ours.round(steps=2)
        changed = {name for name in before if not torch.equal(before[name], ours.params[name])}
        assert changed == {name for name in before if name.startswith(moves)}
        same = {name for name in before if name.startswith(kept) and torch.equal(*(c[name] for c in ours.clients))}
        assert bool(same) == (rule == "ffa_lora")  # FedSA's clients each have an `up` of their own


def test_bytes_are_those_of_what_each_paper_sends(tiny):
    def payload(rule):
        ours = Federation(rule, tiny[0], tiny[2], clients=1)
        return Task(ours.method, ours.server, seed=0).payload(ours.params, cohort=5)

    pair = 8 * 4 * 4 * 3 * 128  # float64; 4 blocks of 4 matrices, rank 3, either half
    assert payload("fedavg") == (2 * pair, 2 * pair)
    assert payload("ffa_lora") == payload("fedsa_lora") == (pair, pair)
    assert payload("fedex_lora") == (2 * pair + 8 * 16 * 128 * 128, 2 * pair)
    assert payload("lora_stacking") == (5 * 2 * pair, 2 * pair)


@pytest.mark.parametrize("rule", RULES)
def test_rules_for_pairs_want_a_method_that_has_them(rule):
    with pytest.raises(InputError, match=f"server {rule} needs the low-rank pairs of method lora, not probe"):
        parse("server", rule).adapt(parse("method", "probe"))


def test_rules_change_nothing_of_a_method_but_what_they_need():
    ours = lora(rank=5, lr=0.3)
    adapted = parse("server", "fedex_lora").adapt(ours)
    assert adapted.inner is ours and adapted.lr == 0.3 and adapted.reads == ours.reads
    assert parse("server", "ffa_lora").adapt(ours) is ours


@component
class OfTheServer(Lora):
    def scope(self, name):
        return "server" if name.startswith("down.") else "shared"


def test_only_a_rule_gives_tensors_to_the_server_and_stacking_refuses_moments(tiny):
    task = Task(OfTheServer(), parse("server", "fedavg"), 0)
    with pytest.raises(InputError, match=r"down\..* the scope server, which only a server rule can give"):
        initial_params(task, tiny[0])
    with pytest.raises(InputError, match="lora_stacking draws new pairs in each round; leave"):
        parse("server", "lora_stacking").adapt(parse("method", {"name": "lora", "persist_optimizer": True}))
