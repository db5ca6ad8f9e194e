"""FedCLIP against a plain transcription of its rules, in float64, parameter by parameter."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from fedsim import InputError, run
from fedsim.checkpoint import load_checkpoint
from fedsim.clients import make_clients
from fedsim.rng import seed_for, torch_rng

ROUNDS, SEED = 4, 3


def reference(features, clients, objective):
    """What the authors' code does, rule by rule; only the data and the random numbers come from fedsim."""
    images, labels = torch.tensor(features.x).double(), torch.tensor(features.y)
    text = torch.tensor(features.class_embeddings).double()
    width = text.shape[1]
    torch.manual_seed(seed_for(SEED, "init"))
    server = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Softmax(dim=1)).double()
    for round in range(1, ROUNDS + 1):
        trained = []
        for client in clients:
            adapter = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Softmax(dim=1))
            adapter.double().load_state_dict(server.state_dict())
            adam = torch.optim.Adam(adapter.parameters(), lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
            rows = torch.tensor(client.train)
            order = torch.randperm(len(rows), generator=torch_rng(SEED, "batches", round, client.id))
            for batch in rows[order].split(32):
                if len(batch) > 1:
                    gated = normalize(adapter(images[batch]) * images[batch], dim=1)
                    if objective == "contrastive":
                        logits = 100 * gated @ text[labels[batch]].T
                        target = torch.arange(len(batch))
                        loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
                    else:
                        loss = cross_entropy(100 * gated @ text.T, labels[batch])
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
            trained.append(adapter.state_dict())
        server.load_state_dict({n: sum(t[n] for t in trained) / len(trained) for n in trained[0]})
    return server.state_dict()


@pytest.mark.parametrize("objective", ["contrastive", "cross_entropy"])
def test_fedclip_is_the_published_algorithm(config, features_dir, objective):
    # 2 clients of 120 rows: 72 train rows, so batches of 32, 32 and 8.
    fields = {"name": "fedclip", "objective": objective}
    ours = config(dtype="float64", seed=SEED, rounds=ROUNDS, train_share=0.6, method=fields)
    features = ours.dataset.load(features_dir)
    population = make_clients(features, ours.partition, None, ("ink",), 0)
    clients = [population[k] for k in range(population.trainers)]
    assert [len(client.train) for client in clients] == [72, 72]
    expected = reference(features, clients, objective)
    # The adapter in the checkpoint is the last round's, whichever was chosen.
    run(ours)
    state, _ = load_checkpoint(ours.folder(), ours.experiment())
    for name, tensor in expected.items():
        torch.testing.assert_close(state.params[f"attention.{name}"], tensor, rtol=1e-9, atol=1e-12)


def test_a_last_batch_of_one_is_skipped(config, features_dir):
    # 33 train rows: one step of 32 rows; with batches of 33 the one step sees all rows, and moves elsewhere.
    share = 33 / 120 + 1e-6
    one = run(config(train_share=share, rounds=1, held_out=("ink", "oil"), out=features_dir / "a"))
    losses = one.tables().rounds.loss
    assert losses.notna().all()
    with pytest.raises(InputError, match=r"--method\.batch-size must be 2 or more with this method, got 1"):
        run(config(method={"name": "fedclip", "batch_size": 1}, out=features_dir / "b"))
