# Makes the records of seconds_dit: bash benchmarks/results/seconds_dit/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare.py --config benchmarks/recipes/dit.yaml --output-dir runs/compare/seconds_dit --images 0 --seeds 0 1 --arms \
  full \
  "muon-importance@0.35 lr 1.2e-2=--optim.name muon --optim.lr 1.2e-2 --pruning.policy importance --optim.compensation 0.5 --pruning.budget 0.35"
