#!/usr/bin/env bash
# The main job on a small scale: installs into .venv, draws a data set into demo/data, trains on it
# with SCAE into demo/run, and says whether the saliency found the objects. Arguments go to train.py.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/venv.sh
python=.venv/bin/python
start=$SECONDS
rm -rf demo/run
$python tools/make_demo_data.py --out demo/data
$python train.py --config pipelines/demo.yaml --data.root demo/data --out demo/run "$@"
$python tools/pointing_game.py --data demo/data --cache demo/run/saliency.lmdb
$python tools/inspect_cache.py demo/run/saliency.lmdb
$python tools/show_erasing.py --data demo/data --cache demo/run/saliency.lmdb \
  --images 8 --lam 0,2,8 --size 128 --out demo/run/erasing.png
echo "demo: $((SECONDS - start)) s; pictures: demo/run/erased.png, demo/run/erasing.png"
echo "      log: demo/run/metrics.jsonl; .venv/bin/tensorboard --logdir demo/run"
