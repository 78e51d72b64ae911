# Makes the records of flow_x33: bash benchmarks/results/flow_x33/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/flow_x33.yaml --output-dir runs/compare/flow_x33 --data path/to/cifar10 --seeds 0 1 --arms \
  "muon-posterior-importance@0.5 lr 8e-3=--optim.name muon --optim.lr 8e-3 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.5" \
  "shortened@0.5 lr*2.00=--epochs 2 --optim.lr 6e-3"

python benchmarks/compare.py --config benchmarks/recipes/flow_x33.yaml --output-dir runs/compare/flow_x33 --data path/to/cifar10 --seeds 0 --arms \
  "full lr*2=--optim.lr 6e-3"
