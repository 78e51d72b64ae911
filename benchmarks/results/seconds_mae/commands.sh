# Makes the records of seconds_mae: bash benchmarks/results/seconds_mae/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/mae.yaml --output-dir runs/compare/seconds_mae --seeds 0 1 --arms \
  full \
  "muon-half@0.5 lr 8e-3=--epochs 10 --optim.name muon --optim.lr 8e-3 --model.decoder cross --adapter.predict 0.5"
