"""The YAML recipes: every setting is known, and they are what they say."""

from pathlib import Path

import pytest

import train
from pipelines.recipe import Config, make_network
from scae_dali.methods import load

PIPELINES = Path(__file__).parents[2] / "pipelines"
BASE = "cifar100_lt"
OVERLAYS = ("drw", "crt", "lws", "mislas_stage1", "mislas_stage2")


def recipe(*names: str, **more: str) -> Config:
    argv = [f"--config={PIPELINES / name}.yaml" for name in names]
    argv += [f"--{key.replace('__', '.')}={value}" for key, value in more.items()]
    parser = train.make_parser()
    settings = parser.instantiate(parser.parse_args([*argv, "--data.root=none", "--out=none"]))
    return Config(**{key: settings[key] for key in Config.__dataclass_fields__})


@pytest.mark.parametrize("name", sorted(path.stem for path in PIPELINES.glob("*.yaml")))
def test_every_setting_of_a_recipe_is_known(name):
    more = {"second_stage__weights": "w.pt"} if name in ("crt", "lws", "mislas_stage2") else {}
    config = recipe(*([BASE, name] if name in OVERLAYS else [name]), **more)
    assert config.method_configs().keys() == {config.method}
    assert type(config.method_configs()[config.method]) is load(config.method).Config
    assert config.image.val_resize >= config.image.size


def test_the_long_tail_recipe_has_the_papers_settings():
    config = recipe(BASE)
    assert (config.data.format, config.data.imbalance) == ("cifar100", 100)
    assert (config.epochs, config.batch_size, config.optim.lr) == (200, 128, 0.1)
    assert (config.optim.schedule, config.optim.lr_min) == ("cosine", 1e-4)
    scae = config.scae
    assert (scae.lam_max, scae.p_min, scae.p_max, scae.gamma) == (2.0, 0.1, 0.5, 0.5)
    assert (scae.area, scae.aspect) == ((0.02, 0.33), (0.3, 3.3))
    assert (scae.tail, scae.mix_prob, scae.mix_alpha, scae.neighbors) == (0.1, 0.5, 0.4, 1)
    parameters = sum(p.numel() for p in make_network(config.model, 100).parameters())
    assert parameters == pytest.approx(0.47e6, rel=0.01)


def test_an_overlay_changes_what_it_names_and_nothing_else():
    first, second = recipe(BASE), recipe(BASE, "mislas_stage2", second_stage__weights="w.pt")
    assert second.model == first.model
    assert second.image == first.image
    assert (second.epochs, second.sampling, second.method) == (10, "class_balanced", "none")
    assert (second.loss.smoothing_head, second.loss.smoothing_tail) == (0.4, 0.1)
    assert second.second_stage.classifier_lr == 0.2
    assert second.second_stage.train_norms
    scae = recipe(BASE, "crt", second_stage__weights="w.pt", method="scae")
    assert (scae.method, scae.second_stage.classifier) == ("scae", "reset")


def test_a_method_that_wants_maps_is_found_beside_one_that_wants_neighbours():
    config = recipe(BASE, method="scae+saliency_mix", scae__lam_max="0")
    assert config.guide() == config.saliency_mix
    assert recipe(BASE, scae__lam_max="0").guide().wants_neighbors
    assert recipe(BASE, scae__lam_max="0", scae__mix_prob="0").guide() is None


METHOD = """
from dataclasses import dataclass, field
from scae_dali.plan.crop import CropConfig
from scae_dali.methods.none import Method

@dataclass(frozen=True, kw_only=True)
class Config:
    crop: CropConfig = field(default_factory=lambda: CropConfig(pad=3))
"""


def test_settings_within_settings_of_a_users_method_stay_what_they_are(tmp_path, monkeypatch):
    (tmp_path / "mine_nested").mkdir()
    (tmp_path / "mine_nested" / "method.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    config = recipe(BASE, method="mine_nested.method")
    assert config.method_configs()["mine_nested.method"].crop.pad == 3


def test_a_second_stage_needs_the_first_ones_weights():
    with pytest.raises(ValueError, match=r"second_stage\.weights must name the first stage's"):
        recipe(BASE, "crt")
