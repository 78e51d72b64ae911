# Makes the records of seconds_flow: bash benchmarks/results/seconds_flow/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/flow.yaml --output-dir runs/compare/seconds_flow --images 0 --seeds 0 1 --arms \
  full \
  "muon-posterior-importance@0.45 lr 8e-3=--optim.name muon --optim.lr 8e-3 --adapter.posterior-mean --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.45 --pruning.over levels"
