"""The YAML recipes: every setting is known, and they are what they say."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import train
from pipelines import memory
from pipelines.config import ExecConfig
from pipelines.data import Data
from pipelines.recipe import Config
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import load
from scae_dali.plan.order import Order
from scae_dali.training.networks import make_network

PIPELINES = Path(__file__).parents[2] / "pipelines"
BASE = "cifar100_lt"
OVERLAYS = (
    "balanced_softmax",
    "cmo",
    "crt",
    "drw",
    "ldam_baseline",
    "lws",
    "mislas_stage1",
    "mislas_stage2",
    "strong",
)


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
    configs = config.method_configs()
    assert [*configs] == config.method.split("+")
    assert all(type(one) is load(method).Config for method, one in configs.items())
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


def test_strong_augmentation_is_a_policy_then_a_black_square_then_the_flip():
    """Of images of 32 px in memory."""
    config = recipe(BASE, "strong", batch_size="64")
    assert config.auto_augment == load("auto_augment").Config(
        policy="cifar10", max_translate_rel=0.4532, fill_value=128
    )
    assert config.cutout == load("cutout").Config(length=16, fill="zero")
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 256, (192, 32, 32, 3), np.uint8)
    index = ImageIndex.from_arrays([f"{k}" for k in range(192)], np.arange(192) % 3)
    data = Data(index, index)
    order = Order(index.labels, batch_size=64, seed=0)

    def batch(method):
        stage = replace(config, method=method).stage(data, None, num_shards=1)
        run = ExecConfig(batch_size=64, threads=1)
        images, rows = memory.train_pipeline(
            stage, ArrayImages(index, pixels), order, config.image, run
        ).run()
        levels = images.as_array() * config.image.std + config.image.mean  # NHWC
        columns = stage.planner(config.image.crop).columns
        return levels, {name: rows.as_array()[:, where] for name, where in columns.items()}

    pictures, part = batch(config.method)
    before, _ = batch("auto_augment")
    plain, _ = batch("none")
    areas = []
    for picture, wanted, flip, box in zip(
        pictures, before, part["flip"][:, 0], part["box"].astype(int), strict=True
    ):
        y, x, h, w = box
        x = 32 - x - w if flip else x
        wanted[y : y + h, x : x + w] = 0
        np.testing.assert_allclose(picture, wanted, atol=1e-3)
        areas.append(h * w)
    assert max(areas) == 256
    assert np.mean(areas) == pytest.approx(192, abs=12)  # 13.9² after clipping
    assert ((before != plain).any(axis=(1, 2, 3))).mean() > 0.5
    scae = recipe(BASE, "strong", method="auto_augment+scae")
    assert scae.auto_augment == config.auto_augment
    assert [*scae.method_configs()] == ["auto_augment", "scae"]


def test_an_overlay_changes_what_it_names_and_nothing_else():
    first, second = recipe(BASE), recipe(BASE, "mislas_stage2", second_stage__weights="w.pt")
    assert second.model == first.model
    assert second.image == first.image
    assert (second.epochs, second.sampling, second.method) == (10, "class_balanced", "none")
    assert (second.loss.smoothing_head, second.loss.smoothing_tail) == (0.4, 0.1)
    assert second.second_stage.classifier_lr == 0.2
    scae = recipe(BASE, "crt", second_stage__weights="w.pt", method="scae")
    assert (scae.method, scae.second_stage.classifier) == ("scae", "reset")


def test_post_hoc_adjustment_takes_off_what_training_has_not_added():
    counts = np.array([30, 20, 10])
    shares = -np.log([2, 3, 6])
    for tau, left in (("0", 1), ("0.25", 0.75), ("1", 0), ("2", -1)):
        found = recipe(BASE, loss__logit_adjust=tau).post_hoc(counts)
        np.testing.assert_allclose(found, left * shares, rtol=1e-12)
    assert not recipe(BASE, "balanced_softmax").post_hoc(counts).any()
    for other in ({"loss__class_balanced": "0.9999"}, {"sampling": "class_balanced"}):
        assert recipe(BASE, **other).post_hoc(counts) is None
    assert recipe(BASE).post_hoc(np.array([7, 7])) is None


@pytest.mark.parametrize(
    ("name", "epochs", "decay"), [("crt", 10, 5e-4), ("lws", 5, 5e-4), ("mislas_stage2", 10, 2e-4)]
)
def test_second_stages_are_those_of_their_authors(name, epochs, decay):
    """Of run_networks.py and cls_crt.yaml, cls_lws.yaml of Kang et al., and of train_stage2.py."""
    config = recipe(BASE, name, second_stage__weights="w.pt")
    assert (config.epochs, config.sampling, config.epoch_length) == (
        epochs,
        "class_balanced",
        "dataset",
    )
    assert config.samples_per_turn == 4
    assert config.second_stage.train_norms
    optim = config.optim
    assert (optim.lr, optim.momentum, optim.nesterov) == (0.1, 0.9, False)
    assert optim.weight_decay == decay
    rates = [optim.lr_at(84 * epoch + step, 84, epochs) for epoch in range(epochs)
             for step in (0, 83)]  # fmt: skip
    cosine = (0.1 * (1 + np.cos(np.pi * np.arange(epochs) / epochs)) / 2).repeat(2)
    assert rates == pytest.approx(cosine)


@pytest.mark.parametrize("second", ["crt", "lws", "mislas_stage2"])
@pytest.mark.parametrize("first", ["mislas_stage1", "ldam_baseline"])
def test_a_second_stage_has_no_warm_up_of_the_first_stages_recipe(first, second):
    optim = recipe(BASE, first, second, second_stage__weights="w.pt").optim
    assert [optim.lr_at(step, 5, 10) for step in (0, 4)] == [optim.lr] * 2


@pytest.mark.parametrize("second", ["crt", "lws", "mislas_stage2"])
@pytest.mark.parametrize("first", ["balanced_softmax", "drw"])
def test_a_second_stage_follows_a_first_one_with_any_loss(first, second):
    loss = recipe(BASE, first, second, second_stage__weights="w.pt").loss
    assert (loss.logit_adjust, loss.class_balanced, loss.defer) == (0, 0, 0)


@pytest.mark.parametrize("second", ["crt", "lws", "mislas_stage2"])
@pytest.mark.parametrize(
    "first", [{"label_smoothing": 0.1}, {"smoothing_head": 0.5, "smoothing_tail": 0.2}]
)
def test_a_second_stage_smooths_labels_as_its_authors_do(first, second, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"loss": first}))
    argv = [f"--config={PIPELINES / BASE}.yaml", f"--config={tmp_path / 'config.json'}"]
    argv += [f"--config={PIPELINES / second}.yaml", "--second_stage.weights=w.pt"]
    parser = train.make_parser()
    loss = parser.instantiate(parser.parse_args([*argv, "--data.root=d", "--out=o"])).loss
    label_aware = (0.4, 0.1) if second == "mislas_stage2" else (None, None)
    assert (loss.smoothing_head, loss.smoothing_tail) == label_aware
    assert loss.label_smoothing == 0


def test_milestones_that_were_not_scaled_with_the_epochs_are_seen():
    for name in ("ldam_baseline", "mislas_stage1"):
        optim = recipe(BASE, name).optim
        assert [optim.early(epochs) for epochs in (200, 360, 400)] == [False, False, True]
    assert not replace(optim, schedule="cosine").early(400)
    assert not replace(optim, milestones=()).early(400)


def test_first_stages_have_the_learning_rates_of_their_authors():
    """adjust_learning_rate of LDAM-DRW and MiSLAS, which count epochs from 1."""
    for name, factors in (("ldam_baseline", (0.01, 0.0001)), ("mislas_stage1", (0.1, 0.01))):
        config = recipe(BASE, name)
        optim = config.optim
        assert (config.epochs, config.batch_size, config.sampling) == (200, 128, "shuffle")
        assert (optim.momentum, optim.nesterov, optim.weight_decay) == (0.9, False, 2e-4)
        for epoch in range(1, 201):
            rate = 0.1
            if epoch <= 5:
                rate = 0.1 * epoch / 5
            elif epoch > 180:
                rate = 0.1 * factors[1]
            elif epoch > 160:
                rate = 0.1 * factors[0]
            for step in (0, 83):
                assert optim.lr_at(84 * (epoch - 1) + step, 84, 200) == pytest.approx(rate)


def test_the_baseline_of_ldam_has_its_authors_images():
    config = recipe(BASE, "ldam_baseline")
    assert (config.method, config.amp) == ("none", "none")
    assert (config.image.crop.kind, config.image.crop.pad) == ("pad", 4)
    assert np.array(config.image.mean) / 255 == pytest.approx([0.4914, 0.4822, 0.4465])
    assert np.array(config.image.std) / 255 == pytest.approx([0.2023, 0.1994, 0.2010])


def test_samples_per_turn_are_refused_where_no_class_has_its_turn():
    message = "samples_per_turn must be 1 with sampling=shuffle, got 4: only class_balanced"
    with pytest.raises(ValueError, match=message):
        recipe(BASE, samples_per_turn="4")
    assert recipe(BASE, epoch_length="dataset").epoch_size(np.zeros(7, int)) == 7


def test_a_method_that_wants_maps_is_found_beside_one_that_wants_neighbours():
    config = recipe(BASE, method="scae+saliency_mix", scae__lam_max="0")
    assert config.guided_config() == config.saliency_mix
    assert recipe(BASE, scae__lam_max="0").guided_config().wants_neighbors
    for method in ("cmo+scae", "scae+cmo"):
        config = recipe(BASE, method=method, cmo__saliency="true", scae__mix_prob="0")
        assert config.guided_config() == config.scae  # its λ is logged
    assert recipe(BASE, scae__lam_max="0", scae__mix_prob="0").guided_config() is None


def test_cmos_recipe_has_the_papers_settings():
    config = recipe(BASE, "cmo")
    assert (config.method, config.epochs, config.batch_size) == ("cmo", 200, 128)
    assert config.optim.weight_decay == 2e-4
    cmo = config.cmo
    assert (cmo.prob, cmo.alpha, cmo.per, cmo.weight_power) == (0.5, 1.0, "batch", 1.0)
    assert (cmo.skip_first, cmo.skip_last) == (3, 3)
    assert config.guided_config() is None
    salient = recipe(BASE, "cmo", cmo__saliency="true")
    assert salient.guided_config() == salient.cmo
    both = recipe(BASE, "cmo", method="scae+cmo", scae__mix_prob="0", cmo__saliency="true")
    assert both.guided_config().guided
    with pytest.raises(ValueError, match="refresh_every must be the same for methods that share"):
        recipe(BASE, method="scae+cmo", cmo__saliency="true", cmo__refresh_every="5")


def test_neighbouring_classes_are_asked_for_where_classes_of_the_tail_are_mixed():
    tailed, balanced = np.array([500, 5, 0]), np.array([50, 50, 50])
    asked = {"scae__neighbors": "3"}
    assert recipe(BASE, **asked).neighbors(tailed) == 3
    assert recipe(BASE, **asked, scae__lam_max="0").neighbors(tailed) == 3
    assert recipe(BASE, **asked).neighbors(balanced) == 0
    for name, value in (("class_aware", "false"), ("mix_prob", "0"), ("neighbors", "0")):
        assert recipe(BASE, **asked | {f"scae__{name}": value}).neighbors(tailed) == 0
    assert recipe(BASE, method="saliency_mix").neighbors(tailed) == 0
    assert recipe(BASE, method="none").neighbors(tailed) == 0


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


GUIDED = """
from dataclasses import dataclass
from scae_dali.methods.none import Method

@dataclass
class Config:
    refresh_every: int = 3
    guided: bool = True
"""


def test_a_users_own_config_says_what_a_run_needs_and_no_more(tmp_path, monkeypatch):
    """It derives from nothing of ours."""
    (tmp_path / "mine_guided").mkdir()
    (tmp_path / "mine_guided" / "method.py").write_text(GUIDED)
    monkeypatch.syspath_prepend(tmp_path)
    guide = recipe(BASE, method="mine_guided.method").guided_config()
    assert (guide.guided, guide.refresh_every) == (True, 3)
    assert (guide.wants_neighbors, guide.neighbors, guide.lam_max) == (False, 0, 0.0)
    with pytest.raises(ValueError, match="refresh_every must be the same for methods that share"):
        recipe(BASE, method="mine_guided.method+scae", scae__mix_prob="0")


MADE_UP = '''
from dataclasses import dataclass
from scae_dali.methods import base, none

@dataclass(frozen=True, kw_only=True)
class Config(base.Config):
    """Made up for a test.

    Args:
        shade: How dark it is.
    """

    shade: float = 0.5

class Method(none.Method):
    kinds = ("erase",)
    fields = {"dark": 1}

    def plan(self, samples):
        return super().plan(samples) | {"dark": self.config.shade + 0 * samples.ids}
'''
SEEN = """
import sys
import numpy as np
import scae_dali.methods as methods
from scae_dali.methods import loading
methods.__path__.append(sys.argv[1])
methods.BUILT_IN = loading.BUILT_IN = (*loading.BUILT_IN, "made_up")

import train
from pipelines.recipe import Config
from scae_dali import ImageIndex, Stage
parser = train.make_parser()
found = parser.parse_args(
    ["--data.root=none", "--out=none", "--method=made_up+mixup", "--made_up.shade=0.25"]
)
settings = parser.instantiate(found)
config = Config(**{name: settings[name] for name in Config.__dataclass_fields__})
print(config.method_configs())
(action,) = [one for one in parser._actions if one.dest == "made_up.shade"]
print(action.help)
index = ImageIndex.from_arrays(["a", "b"], np.array([0, 1]))
for settings in (config.method_configs(), {"made_up": {"shade": 0.25}}):
    stage = Stage(index, "made_up+mixup", epochs=1, batch_size=2, seed=0, **settings)
    planner = stage.planner()
    rows = planner(np.arange(2), np.zeros(2, int), np.full((2, 2), 8))
    print(rows[:, planner.columns["dark"]].ravel().tolist())
"""


def test_a_new_built_in_method_is_a_module_and_a_name_in_the_list(tmp_path):
    (tmp_path / "made_up.py").write_text(MADE_UP)
    command = [sys.executable, "-c", SEEN, str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    configs, text, *plans = done.stdout.splitlines()
    assert configs.startswith("{'made_up': Config(shade=0.25), 'mixup': Config(")
    assert text.startswith("How dark it is.")
    assert plans == ["[0.25, 0.25]"] * 2


def test_a_second_stage_needs_the_first_ones_weights():
    with pytest.raises(ValueError, match=r"second_stage\.weights must name the first stage's"):
        recipe(BASE, "crt")
