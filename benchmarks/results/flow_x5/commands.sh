# Makes the records of flow_x5: bash benchmarks/results/flow_x5/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/flow_x5.yaml --output-dir runs/compare/flow_x5 --seeds 0 --arms \
  "full lr*2=--optim.lr 6e-3" \
  full \
  "muon-posterior-importance@0.5 lr 8e-3=--optim.name muon --optim.lr 8e-3 --adapter.posterior-mean --pruning.policy importance --pruning.over levels --optim.compensation 0.5 --pruning.budget 0.5" \
  "shortened@0.57 lr*2.00=--epochs 4 --optim.lr 6e-3"
