"""Defaults are those of one published program each, and every method and server rule says of which."""

import re
import sys

import pytest

from fedsim.config import read_yaml
from fedsim.registry import available, parse

# By hand from the authors' repositories, at the commits that the docstrings name: what the program trains with.
SGD = {"optimizer": "sgd", "momentum": 0.9}
PER_ROUND = {"schedule": "cosine", "warmup_rounds": 0}  # CosineAnnealingLR, one step per round
CONSTANT = {"schedule": "constant", "warmup_rounds": 0}
PROGRAMS = {
    # readme.md: methods/fed_at_clip.py --iters 200 --wk_iters 1 --lr 5e-05
    "fedclip": {"optimizer": "adam", "lr": 5e-5, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2}
    | {"batch_size": 32, "local_epochs": 1, "persist_optimizer": False, "objective": "contrastive"},
    # train.py
    "fedmp": {"optimizer": "adam", "lr": 5e-5, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2}
    | {"batch_size": 18, "local_epochs": 2, "alpha": 0.3, "objective": "contrastive"},
    # scripts/main_pipeline.sh, configs/trainers/CoOp/vit_b16_ep50.yaml
    "promptfl": SGD | {"lr": 1e-3, "weight_decay": 5e-4, "batch_size": 32, "local_epochs": 5, "length": 16},
    # ProGrad.public/scripts/prograd.sh, configs/trainers/ProGrad/rn50.yaml
    "prograd": SGD
    | {"lr": 2e-3, "weight_decay": 5e-4, "batch_size": 32, "local_epochs": 1, "length": 16, "projection": 1.0}
    | PER_ROUND,
    # train.py, configs/trainers/CoCoOp/vit_b16_c4_ep10_batch1_ctxv1.yaml
    "cocoop": SGD
    | {"lr": 2e-3, "weight_decay": 5e-4, "batch_size": 1, "local_epochs": 1, "init": "a photo of a", "reduction": 16}
    | PER_ROUND,
    # federated_main.py, over which configs/trainers/PromptFolio/vit_b16.yaml is laid
    "promptfolio": SGD
    | {"lr": 2e-3, "weight_decay": 5e-4, "batch_size": 16, "local_epochs": 5, "length": 8, "theta": 0.4},
    # BMIPRS: train.py, configs/trainers/ProDA/vit_b16_c2_e100_ctx16_warmup5_BZ64_ProDA.yaml
    "proda": SGD | {"lr": 1e-3, "weight_decay": 5e-4, "batch_size": 4, "local_epochs": 1, "length": 16} | PER_ROUND,
    # plot-coop/scripts/main.sh, configs/trainers/PLOT/rn50.yaml, train.py
    "plot": SGD
    | {"lr": 2e-3, "weight_decay": 5e-4, "batch_size": 128, "local_epochs": 1, "length": 16, "prompts": 4}
    | {"entropy": 0.1, "tolerance": 1e-2, "iterations": 100}
    | PER_ROUND,
    # scripts/fedotp_cifar100.sh, configs/trainers/GLP_OT/vit_b16.yaml
    "fedotp": SGD
    | {"lr": 1e-3, "weight_decay": 5e-4, "batch_size": 32, "local_epochs": 1, "length": 4}
    | {"entropy": 0.1, "mass": 0.8, "tolerance": 1e-3, "iterations": 100}
    | CONSTANT,
    # code/federated_main.py --trainer VPT, code/configs/datasets/cifar100.yaml
    "fedvpt": SGD
    | {"lr": 1e-3, "weight_decay": 5e-4, "batch_size": 32, "local_epochs": 1, "length": 16, "depth": 1}
    | CONSTANT,
    # train.py, configs/trainers/MaPLe/vit_b16_c2_ep5_batch4_2ctx.yaml
    "maple": SGD
    | {"lr": 3.5e-3, "weight_decay": 5e-4, "batch_size": 4, "init": "a photo", "words": "of a", "depth": 9}
    | PER_ROUND,
    # train.py, configs/trainers/PromptSRC/vit_b16_c2_ep20_batch4_4+4ctx.yaml
    "promptsrc": SGD
    | {"lr": 2.5e-3, "weight_decay": 5e-4, "batch_size": 4, "init": "a photo of a", "visual_length": 4, "depth": 9}
    | {"text_pull": 25.0, "image_pull": 10.0, "logit_pull": 1.0}
    | PER_ROUND,
    # scripts/base2new.sh, configs/trainers/pFedMMA/vit_b16.yaml: blocks 5 to 12
    "pfedmma": SGD
    | {"lr": 1e-3, "weight_decay": 5e-4, "batch_size": 32, "local_epochs": 1, "blocks": 8, "width": 32, "scale": 1e-3}
    | CONSTANT,
    # federated_main.py, configs/trainers/CAPT/vit_b16.yaml
    "capt": SGD
    | {"lr": 1e-3, "weight_decay": 5e-4, "batch_size": 32, "local_epochs": 1, "length": 4, "general": 1}
    | {"general_weight": 1.0, "class_weight": 1.0, "temperature": 0.1}
    | CONSTANT,
    # train.sh, for CIFAR-100 with 10 classes per client; main_prompt.py
    "sgpt": SGD
    | {"lr": 0.01, "weight_decay": 1e-5, "batch_size": 40, "local_epochs": 5, "shared_blocks": 4, "group_blocks": 3}
    | {"groups": 20, "pull": 1.0}
    | CONSTANT,
    # readme.md, methods/PLAN.py
    "plan": SGD
    | {"lr": 1.5e-3, "weight_decay": 5e-4, "batch_size": 32, "local_epochs": 1, "length": 8, "depth": 12}
    | {"heads": 8, "text_aggregation": "mean", "distillation": 1.0}
    | CONSTANT,
    # Launch_FL.py, config/defaults.py
    "fedmvp": SGD
    | {"lr": 3e-3, "weight_decay": 1e-5, "batch_size": 128, "local_epochs": 1, "length": 4, "heads": 4}
    | {"consistency": 10.0, "persist_optimizer": True, "label_space": "client"}
    | PER_ROUND,
    # main.py
    "facmic": {"optimizer": "adam", "lr": 5e-5, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.02}
    | {"batch_size": 32, "local_epochs": 1, "persist_optimizer": True, "adaptation": 1.0}
    | CONSTANT,
    # main.py
    "faaclip": {"optimizer": "adam", "lr": 5e-5, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.02}
    | {"batch_size": 32, "local_epochs": 1, "persist_optimizer": True, "adversary": 0.5}
    | CONSTANT,
    # federated_main.py, configs/trainers/PLOT/vit_b16.yaml
    "fedpgp": SGD
    | {"lr": 1e-3, "weight_decay": 5e-4, "batch_size": 32, "local_epochs": 2, "length": 16}
    | {"rank": 4, "contrast": 1.0, "temperature": 0.5}
    | CONSTANT,
    # federated_main.py, configs/trainers/DP-FPL/vit_b16.yaml
    "dp_fpl": SGD
    | {"lr": 1e-3, "weight_decay": 5e-4, "batch_size": 32, "local_epochs": 1, "length": 16}
    | {"rank": 8, "private_lr": 0.1}
    | CONSTANT,
    # Launch_FL.py, config/defaults.py, federated/utils.py
    "fedtpg": SGD
    | {"lr": 3e-3, "weight_decay": 1e-5, "batch_size": 200, "local_epochs": 1, "length": 4, "heads": 4}
    | {"persist_optimizer": True, "label_space": "client"}
    | PER_ROUND,
    # Launch_FL.py --model_name coop --w 8
    "kgcoop": SGD
    | {"lr": 3e-3, "weight_decay": 1e-5, "batch_size": 200, "local_epochs": 1, "length": 4, "pull": 8.0}
    | {"persist_optimizer": True, "label_space": "client"}
    | PER_ROUND,
    # supervised/prompt-ours.py, supervised/utils.py
    "fedapt": SGD
    | {"lr": 0.01, "weight_decay": 1e-5, "batch_size": 256, "local_epochs": 1, "length": 24, "temperature": 0.01}
    | CONSTANT,
    # federated_main.py, configs/datasets/OfficeHome.yaml
    "fedpha": SGD
    | {"lr": 1e-3, "weight_decay": 5e-4, "batch_size": 32, "local_epochs": 1, "length": 16, "private_length": 16}
    | {"share": 0.8, "pull": 1.0, "push": 1.0, "margin": 1.0}
    | CONSTANT,
    # train.sh, methods/FedMoeP_NR_cos.py
    "trip": {"optimizer": "adamw", "lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-7, "weight_decay": 0.01}
    | {"batch_size": 16, "local_epochs": 1, "length": 2, "experts": 4, "distillation": 1.0}
    | {"room": 1.0, "test_room": 2.0, "schedule": "exponential", "lr_decay": 0.8},
    # main_imagenet.py, configs/imagenet.yaml
    "tip_adapter": {"optimizer": "adamw", "lr": 1e-3, "eps": 1e-4, "weight_decay": 0.01, "batch_size": 256}
    | {"alpha": 1.17, "beta": 1.0, "shots": 16},
    # system/main.py, flcore/clients/clientlora.py, the batch from scripts/p37/p37_gs_lorat_sd_all_pfl.sh
    "lora": {"optimizer": "adamw", "lr": 5e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    | {"batch_size": 32, "local_epochs": 1, "rank": 2, "alpha": 16.0, "towers": "text", "objective": "contrastive"}
    | {"clip_norm": 1.0}
    | CONSTANT,
    # scripts/d47/d47_gs_soradualheterot_sd_all_pfl.sh, system/main.py, flcore/clients/clientsoradualhetero.py
    "feddlp": {"optimizer": "adamw", "lr": 5e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    | {"batch_size": 32, "local_epochs": 1, "rank": 2, "own_rank": 4, "alpha": 16.0, "modules": "all", "clip_norm": 1.0}
    | {"own_teacher": 10.0, "shared_teacher": 1.0, "temperature": 3.0, "threshold": 5e-5}
    | CONSTANT,
    # src/train_vilt.sh, src/train/visionlanguage_tasks/task_trainer.py, src/configs/task_configs_fed.py
    "feddat": {"optimizer": "adamw", "lr": 1e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.01}
    | {"local_epochs": 1, "reduction": 16, "temperature": 3.0},
    # the paper, and train.py
    "fedsdaf": SGD
    | {"lr": 1e-3, "weight_decay": 5e-4, "batch_size": 128, "local_epochs": 30, "reduction": 4, "heads": 8}
    | {"distillation": 1.0},
    # src/train.py, src/client_utils.py, src/model/clip_utils/adapters.py
    "ffdvp": {"optimizer": "adam", "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    | {"batch_size": 18, "local_epochs": 10, "length": 20, "prompt_width": 768, "dropout": 0.5, "head_weight": 0.1}
    | CONSTANT,
    # clip_adapter.py
    "clip_adapter": {"reduction": 4, "ratio": 0.2},
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_methods_defaults_are_those_of_the_program_that_it_names(name):
    method = parse("method", name)
    assert {field: getattr(method, field) for field in PROGRAMS[name]} == PROGRAMS[name]


@pytest.mark.parametrize(("kind", "name"), [(kind, n) for kind in ("method", "server") for n in available(kind)])
def test_every_method_and_rule_names_the_commit_that_it_was_checked_against_or_says_that_it_was_not(kind, name):
    component = type(parse(kind, name))
    bases = [base for base in component.__mro__ if base.__module__.startswith(f"fedsim.{kind}s.")]
    docs = [doc for base in bases for doc in (sys.modules[base.__module__].__doc__, base.__doc__)]
    said = " ".join(" ".join(filter(None, docs)).split())
    assert "Source: " in said, f"the docstring at the top of {kind}s/{name}.py needs a line `Source: ...`"
    # --help shows it.
    assert component.__doc__.splitlines()[0].endswith("."), f"{component.__name__}'s docstring needs a first sentence"
    # Zero-shot CLIP and training alone have no hyperparameters.
    checked = re.search(r"commit [0-9a-f]{7}\b|not checked against code|Source: ours", said)
    assert checked or name in ("zero_shot", "local_only"), f"{kind}s/{name}.py names no commit of its source"


def test_the_papers_config_spells_out_the_methods_own_defaults():
    method = read_yaml("paper")["method"]
    assert parse("method", method) == parse("method", "fedclip")
