# Makes the records of mae_x124: bash benchmarks/results/mae_x124/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/mae_x124.yaml --output-dir runs/compare/mae_x124 --data path/to/cifar10 --seeds 0 1 --arms \
  "muon-half@0.5 lr 8e-3=--epochs 4 --model.decoder cross --adapter.predict 0.5 --optim.name muon --optim.lr 8e-3" \
  "shortened@0.5 lr*1.00=--epochs 4 --optim.lr 1.5e-3"

python benchmarks/compare.py --config benchmarks/recipes/mae_x124.yaml --output-dir runs/compare/mae_x124 --data path/to/cifar10 --seeds 0 --arms \
  "b64@0.5 lr 1.1e-3=--epochs 4 --batch-size 64 --optim.lr 1.1e-3" \
  full
